"""Copy stdin to stdout, byte for byte, until end of file; then say how many bytes there were, on stderr."""
import os

os.write(1, b"ready\n")
total = 0
while True:
    data = os.read(0, 65536)
    if not data:
        break
    total += len(data)
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]
os.write(2, b"eof after %d bytes\n" % total)
