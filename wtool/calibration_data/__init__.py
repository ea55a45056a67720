"""Text to calibrate on, as windows of tokens.

source    what the user asked, and from each reference to its documents
files     text and JSON files
hub       datasets of the Hub, of a folder or of a parquet file
builtin   prose and code that every Python carries
rows      a row as a text, a conversation or token ids
tokens    documents as token ids
packing   from documents to windows
windows   the windows and their record
"""

from wtool.calibration_data.source import CalibrationSource as CalibrationSource
from wtool.calibration_data.windows import Windows as Windows
from wtool.calibration_data.windows import windows as windows
