"""Prompts to a judge, a jinja2 file a benchmark; read by `suites.judging`, imported by nobody."""
