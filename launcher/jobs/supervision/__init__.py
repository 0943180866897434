"""What keeps a job alive: attempts, what ended them, and what is done about it."""
