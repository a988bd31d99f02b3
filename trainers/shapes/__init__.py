"""The embedded default: procedural picture worlds and the small LLaVAs that were trained on them.

``world`` and ``prior_world`` make pictures and questions, ``build_base`` and ``build_prior_base`` train the checkpoints; imported by the
pipeline and by tests.
"""

from pathlib import Path

SHIPPED = {
    name: Path(__file__).resolve().parent / folder for name, folder in (("shapes", "base"), ("shapes_prior", "prior_base"))
}
"""Name that a configuration gives in place of a path -> folder of the checkpoint."""
