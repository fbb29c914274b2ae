"""What regenerating a paper's table takes."""
