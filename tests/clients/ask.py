"""ask.py DIRECTORY PORT PROMPT...: what a sensor's author writes with edge_client; CPython and MicroPython.

Prints a line for each prompt: `text ...` or `error CODE`, in ASCII. A prompt `@TOPIC VALUE` is a reading.
"""

import sys

sys.path.insert(0, sys.argv[1])
edge_client = __import__("edge_client")


def ascii_only(text: str) -> str:
    return "".join([c if " " <= c <= "~" else f"<{ord(c):x}>" for c in text])


class File:
    """A port that reads what is there, as machine.UART with timeout=0 does on a microcontroller."""

    def __init__(self, path: str) -> None:
        self._poll = __import__("select").poll()
        self._file = __import__("io").open(path, "r+b", 0)
        self._poll.register(self._file, 1)
        self.write = self._file.write

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count and self._poll.poll(0):
            data += self._file.read(1)
        return data


def open_port(path: str) -> object:
    if sys.implementation.name == "micropython":
        return File(path)
    return __import__("serial").Serial(path, 115200, timeout=0)


client = edge_client.EdgeClient(open_port(sys.argv[2]), on_partial=lambda piece: None)
for prompt in sys.argv[3:]:
    if prompt.startswith("@"):
        topic, value = prompt[1:].split()
        client.reading(topic, float(value))
        continue
    try:
        print("text", ascii_only(client.ask(prompt, 60)["text"]))
    except edge_client.EdgeError as error:
        print("error", error.code)
