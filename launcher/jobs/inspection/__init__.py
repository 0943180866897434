"""What is known of runs from outside: their state, their facts, their logs."""
