"""What training costs: programs, seconds, bytes. Everything here calls what training calls."""
