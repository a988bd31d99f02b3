"""What is delivered, made and tried: `make wheels` and `make versions`."""
