"""Helpers of the book *In-Context Learning as Gradient Descent*; one idea per module."""

import warnings

# Pages show progress as text. tqdm asks for widgets instead, in a line that names a folder of the machine.
warnings.filterwarnings("ignore", "IProgress not found")
