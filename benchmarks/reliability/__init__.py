"""What a run survives, and what that costs; whether results depend on how they were computed."""
