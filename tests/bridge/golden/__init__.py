"""Golden vectors recorded from stock releases."""
