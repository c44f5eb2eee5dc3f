"""Helpers of the book *In-Context Learning as Gradient Descent*; one idea per module."""
