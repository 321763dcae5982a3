"""Write COUNT bytes of zero, which is valid UTF-8 and grows sixfold as JSON, and nothing else: zeros.py COUNT."""
import os
import sys

left = int(sys.argv[1])
while left:
    left -= os.write(1, bytes(min(left, 65536)))
