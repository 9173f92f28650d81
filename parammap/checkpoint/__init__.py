"""What every reader yields and every writer takes."""
