"""What answers are worth: measures, results, reports."""
