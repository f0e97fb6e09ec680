"""What judges answers, one file each: a number for each answer, and why where there is none."""
