"""What the tasks' gradients say of one another, of the past and of what was kept."""
