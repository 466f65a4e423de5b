"""What runs inside the sandbox: the standard library only, and of that only what starts quickly."""
