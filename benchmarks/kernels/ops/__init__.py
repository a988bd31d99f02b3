"""The cases of each op: inputs, least work, float64 truth. Nothing here knows a contestant."""
