"""Every op against its peers and against float64 truth: cases, contestants, harness, page."""
