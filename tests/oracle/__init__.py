"""What the package is compared with: reference implementations that share no code with it."""
