"""What is asked of a judge, in which process, and what its answers come to."""
