"""The `mmdpo` command: what of it is typed, and what it prints. The top room: nothing imports it."""
