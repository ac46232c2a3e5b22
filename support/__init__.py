"""What training and figures need, and the exercise is not about."""
