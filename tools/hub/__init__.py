"""The ops as a repository for Hugging Face's `kernels` package: `make hub`, docs/hub.md."""
