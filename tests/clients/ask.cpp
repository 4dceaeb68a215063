// ask PORT PROMPT...: what a sensor's author writes with EdgeClient.h, with a POSIX port in place of HardwareSerial.
// Prints a line for each prompt: `text ...` or `error CODE`, in ASCII. A prompt `@TOPIC VALUE` is a reading.
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "EdgeClient.h"

struct Port {
  int file;
  int available() {
    pollfd waiting = {file, POLLIN, 0};
    return ::poll(&waiting, 1, 0) > 0 && (waiting.revents & POLLIN);
  }
  int read() {
    unsigned char byte;
    return ::read(file, &byte, 1) == 1 ? byte : -1;
  }
  size_t write(uint8_t byte) { return ::write(file, &byte, 1) == 1; }
};

static unsigned long milliseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (unsigned long)(now.tv_sec * 1000 + now.tv_nsec / 1000000);
}

static void print_ascii(const char *text) {
  for (const unsigned char *c = (const unsigned char *)text; *c;) {
    if (*c < 0x80) {
      putchar(*c++);
      continue;
    }
    unsigned long code = *c & (*c >= 0xF0 ? 7 : *c >= 0xE0 ? 15 : 31);
    for (c++; (*c & 0xC0) == 0x80; c++) code = code << 6 | (*c & 0x3F);
    printf("<%lx>", code);
  }
  putchar('\n');
}

int main(int count, char **arguments) {
  Port port = {open(arguments[1], O_RDWR | O_NOCTTY)};
  if (port.file < 0) return 1;
  EdgeClient<Port> edge(port, milliseconds, (uint32_t)getpid() << 16 ^ (uint32_t)milliseconds());
  for (int i = 2; i < count; i++) {
    char topic[64];
    double value;
    if (sscanf(arguments[i], "@%63s %lf", topic, &value) == 2) {
      edge.reading(topic, value, 2);
      continue;
    }
    if (!edge.ask(arguments[i], "\"max_tokens\":100", 60000)) return 2;
    EdgeStatus status;
    while ((status = edge.poll()) == EDGE_WAITING) usleep(1000);
    if (status == EDGE_ANSWERED) {
      fputs("text ", stdout);
      print_ascii(edge.text());
    } else {
      printf("error %s\n", edge.code());
    }
    fflush(stdout);
  }
  return 0;
}
