// Ask an edge-daemon over a serial line. One header, no library, no dynamic memory; C++11.
//
//   EdgeClient<HardwareSerial> edge(Serial1, millis, seed);   // seed: anything that differs after each reset,
//                                                              // analogRead of an open pin or esp_random()
//   edge.reading("sensors/left/temperature", -14.5, 1);        // for the daemon's routes; no answer
//   edge.ask("Why does a freezer warm up at night?", "\"max_tokens\":60");
//   void loop() {
//     switch (edge.poll()) {                                   // never waits
//       case EDGE_ANSWERED: Serial.println(edge.text()); break;
//       case EDGE_FAILED:   Serial.println(edge.code()); break;
//       default: break;
//     }
//   }
//
// A frame is one line: a JSON object in ASCII, `*`, and the CRC-32 of the object as 8 hex digits. What noise or a
// restart of the daemon swallows is sent again; the daemon recognises a repeated id and answers it once.
// `ask` keeps pointers only: the prompt and the fields must stay where they are until the answer is there.
// LINE is the longest line that can be received; a longer answer fails as "too_long": ask for fewer tokens.
#ifndef EDGE_CLIENT_H
#define EDGE_CLIENT_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum EdgeStatus { EDGE_IDLE, EDGE_WAITING, EDGE_ANSWERED, EDGE_FAILED };

template <typename Port, size_t LINE = 1024>
class EdgeClient {
 public:
  EdgeClient(Port &port, unsigned long (*milliseconds)(), uint32_t seed)
      : port_(port), now_(milliseconds), seed_(seed) {}

  // Send a question. `fields` are more members of the request, as JSON without braces, or NULL.
  // False if the last question still waits. `timeout_ms` counts from now.
  bool ask(const char *prompt, const char *fields = NULL, unsigned long timeout_ms = 120000) {
    if (status_ == EDGE_WAITING) return false;
    prompt_ = prompt;
    fields_ = fields;
    timeout_ = timeout_ms;
    number_++;
    status_ = EDGE_WAITING;
    acknowledged_ = false;
    tries_ = 0;
    begun_ = sent_ = now_();
    wait_ = 0;
    return true;
  }

  // Send a reading with so many decimals, as a message on an MQTT topic would be.
  void reading(const char *topic, double value, unsigned char decimals = 2) {
    begin();
    put("{\"type\":\"reading\",\"topic\":");
    put_string(topic);
    put(",\"payload\":");
    put_number(value, decimals);
    put("}");
    end();
  }

  // Read what has come and send what is due. EDGE_ANSWERED or EDGE_FAILED comes once for each question.
  EdgeStatus poll() {
    while (status_ <= EDGE_WAITING && port_.available() > 0) take_byte((char)port_.read());
    if (status_ == EDGE_WAITING) {
      if (now_() - begun_ >= timeout_) {
        cancel();
        fail("expired");
      } else if (now_() - sent_ >= wait_) {
        send();
      }
    }
    EdgeStatus status = status_;
    if (status == EDGE_ANSWERED || status == EDGE_FAILED) status_ = EDGE_IDLE;
    return status;
  }

  // The answer's text in UTF-8, until the next `poll`.
  const char *text() const { return text_; }
  // Why there is none: the contract's error code, or "unavailable", "expired", "too_long".
  const char *code() const { return code_; }

 private:
  static const unsigned char kTries = 5;
  static const unsigned long kFirstWait = 400, kLastWait = 3200, kRepeat = 100;
  static const unsigned long kRemind = 10000;  // an acknowledged request is repeated, in case its answer was lost

  void send() {
    if (acknowledged_) {
      wait_ = kRemind;
    } else {
      if (tries_ == kTries) return fail("unavailable");
      wait_ = kFirstWait << tries_;
      if (wait_ > kLastWait) wait_ = kLastWait;
      tries_++;
    }
    sent_ = now_();
    begin();
    put("{\"id\":");
    put_id();
    put(",\"stream\":false,\"prompt\":");
    put_string(prompt_);
    if (fields_) {
      put(",");
      put(fields_);
    }
    put("}");
    end();
  }

  void cancel() {
    begin();
    put("{\"type\":\"cancel\",\"id\":");
    put_id();
    put("}");
    end();
  }

  void fail(const char *code) {
    strncpy(code_, code, sizeof code_ - 1);
    status_ = EDGE_FAILED;
  }

  void take_byte(char c) {
    if (c != '\n') {
      if (length_ < LINE) line_[length_] = c;
      if (length_ <= LINE) length_++;
      return;
    }
    size_t length = length_;
    length_ = 0;
    if (status_ != EDGE_WAITING) return;
    if (length > LINE) {
      line_[LINE] = 0;
      char type[8], id[24];
      bool ours = member("id", id, sizeof id) && is_id(id);
      if (ours && member("type", type, sizeof type) && !strcmp(type, "final")) fail("too_long");
    } else if (length > 1 && !take_line(length)) {
      repeat();
    }
  }

  // Send again soon: somebody is there, but a line was spoilt.
  void repeat() {
    if (wait_ > kRepeat) wait_ = kRepeat;
    acknowledged_ = false;
    tries_ = 0;
  }

  // False if the line is damaged.
  bool take_line(size_t length) {
    while (length && (line_[length - 1] == '\r' || line_[length - 1] == ' ')) length--;
    if (length < 11 || line_[length - 9] != '*') return false;
    uint32_t check = 0;
    for (size_t i = length - 8; i < length; i++) {
      int digit = hex(line_[i]);
      if (digit < 0) return false;
      check = check << 4 | (uint32_t)digit;
    }
    uint32_t crc = 0xFFFFFFFFu;
    for (size_t i = 0; i < length - 9; i++) crc = crc_step(crc, line_[i]);
    if (~crc != check) return false;
    line_[length - 9] = 0;

    char type[8], id[24];
    const char *name = member("type", type, sizeof type) ? type : "";
    bool ours = member("id", id, sizeof id) && is_id(id);
    if (!strcmp(name, "nak") && !acknowledged_) {
      repeat();
    } else if (!strcmp(name, "hello") && acknowledged_) {
      acknowledged_ = false;  // the daemon was restarted, or the cable came out
      tries_ = 0;
      wait_ = 0;
    } else if (!strcmp(name, "error") && (ours || !value_of("id") || *value_of("id") == 'n')) {
      if (!member("code", code_, sizeof code_)) code_[0] = 0;
      status_ = EDGE_FAILED;
    } else if (ours && !strcmp(name, "final")) {
      char *text = value_of("text");
      text_ = text && *text == '"' ? text : line_;
      if (text_ == line_) line_[0] = 0;
      else text_ = unescape(text);
      status_ = EDGE_ANSWERED;
    } else if (ours) {
      acknowledged_ = true;
      tries_ = 0;
      wait_ = kRemind;
    }
    return true;
  }

  // The value of a member of the object in line_, or NULL; members of members are passed over.
  char *value_of(const char *name) {
    int depth = 0;
    bool is_name = false;
    for (char *c = line_; *c; c++) {
      if (*c == '{' || *c == '[') {
        is_name = ++depth == 1;
      } else if (*c == '}' || *c == ']') {
        depth--;
      } else if (*c == ',') {
        is_name = depth == 1;
      } else if (*c == '"') {
        char *start = c + 1;
        for (c++; *c && *c != '"'; c++)
          if (*c == '\\' && c[1]) c++;
        if (!*c) return NULL;
        if (is_name && strlen(name) == (size_t)(c - start) && !strncmp(name, start, c - start)) {
          for (c++; *c == ':' || *c == ' '; c++) {
          }
          return *c ? c : NULL;
        }
        is_name = false;
      }
    }
    return NULL;
  }

  // Copy a member that is a string without escapes; false if there is none or it is too long.
  bool member(const char *name, char *into, size_t room) {
    const char *value = value_of(name);
    if (!value || *value != '"') return false;
    size_t i = 0;
    for (value++; *value && *value != '"' && i + 1 < room; value++) into[i++] = *value;
    into[i] = 0;
    return *value == '"';
  }

  // Turn a JSON string, in its place, into UTF-8.
  static char *unescape(char *quoted) {
    char *from = quoted + 1, *to = quoted + 1;
    while (*from && *from != '"') {
      if (*from != '\\') {
        *to++ = *from++;
        continue;
      }
      from++;
      if (*from == 'u') {
        uint32_t code = code_unit(from + 1);
        from += 5;
        if (code >= 0xD800 && code < 0xDC00 && from[0] == '\\' && from[1] == 'u') {
          code = 0x10000 + ((code - 0xD800) << 10) + (code_unit(from + 2) - 0xDC00);
          from += 6;
        }
        to = put_utf8(to, code);
      } else {
        static const char escapes[] = "b\bf\fn\nr\rt\t";
        char out = *from;
        for (const char *e = escapes; *e; e += 2)
          if (*e == *from) out = e[1];
        *to++ = out;
        from++;
      }
    }
    *to = 0;
    return quoted + 1;
  }

  static uint32_t code_unit(const char *digits) {
    uint32_t code = 0;
    for (int i = 0; i < 4; i++) code = code << 4 | (uint32_t)(hex(digits[i]) & 15);
    return code;
  }

  // An escape is never shorter than its character, so this can't overtake the reading.
  static char *put_utf8(char *to, uint32_t code) {
    if (code < 0x80) {
      *to++ = (char)code;
    } else if (code < 0x800) {
      *to++ = (char)(0xC0 | code >> 6);
      *to++ = (char)(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      *to++ = (char)(0xE0 | code >> 12);
      *to++ = (char)(0x80 | (code >> 6 & 0x3F));
      *to++ = (char)(0x80 | (code & 0x3F));
    } else {
      *to++ = (char)(0xF0 | code >> 18);
      *to++ = (char)(0x80 | (code >> 12 & 0x3F));
      *to++ = (char)(0x80 | (code >> 6 & 0x3F));
      *to++ = (char)(0x80 | (code & 0x3F));
    }
    return to;
  }

  static int hex(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
  }

  static uint32_t crc_step(uint32_t crc, char c) {
    crc ^= (uint8_t)c;
    for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
    return crc;
  }

  void begin() { crc_ = 0xFFFFFFFFu; }

  void end() {
    uint32_t crc = ~crc_;
    port_.write((uint8_t)'*');
    for (int shift = 28; shift >= 0; shift -= 4) port_.write((uint8_t) "0123456789ABCDEF"[crc >> shift & 15]);
    port_.write((uint8_t)'\n');
  }

  void put(char c) {
    crc_ = crc_step(crc_, c);
    port_.write((uint8_t)c);
  }

  void put(const char *text) {
    while (*text) put(*text++);
  }

  void put_hex(uint32_t value, int digits) {
    while (digits--) put("0123456789abcdef"[value >> 4 * digits & 15]);
  }

  // The id of the current question: the seed and the question's number.
  void make_id(char *into) {
    uint32_t values[2] = {seed_, number_};
    for (int i = 0; i < 2; i++) {
      for (int shift = 28; shift >= 0; shift -= 4) *into++ = "0123456789abcdef"[values[i] >> shift & 15];
      *into++ = i ? 0 : '.';
    }
  }

  void put_id() {
    char id[18];
    make_id(id);
    put_string(id);
  }

  bool is_id(const char *text) {
    char id[18];
    make_id(id);
    return !strcmp(text, id);
  }

  // UTF-8 as a JSON string in ASCII; bytes that are no UTF-8 become U+FFFD.
  void put_string(const char *text) {
    put('"');
    while (*text) {
      uint32_t code = next_code(text);
      if (code == '"' || code == '\\') {
        put('\\');
        put((char)code);
      } else if (code >= 32 && code < 127) {
        put((char)code);
      } else if (code < 0x10000) {
        put("\\u");
        put_hex(code, 4);
      } else {
        put("\\u");
        put_hex(0xD800 + ((code - 0x10000) >> 10), 4);
        put("\\u");
        put_hex(0xDC00 + ((code - 0x10000) & 0x3FF), 4);
      }
    }
    put('"');
  }

  static uint32_t next_code(const char *&text) {
    uint8_t first = (uint8_t)*text++;
    if (first < 0x80) return first;
    int more = first >= 0xF0 && first < 0xF5 ? 3 : first >= 0xE0 && first < 0xF0 ? 2 : first >= 0xC2 && first < 0xE0 ? 1 : 0;
    if (!more) return 0xFFFD;
    uint32_t code = first & (0x3F >> more);
    for (int i = 0; i < more; i++) {
      if (((uint8_t)text[i] & 0xC0) != 0x80) return 0xFFFD;
      code = code << 6 | ((uint8_t)text[i] & 0x3F);
    }
    text += more;
    return code > 0x10FFFF || (code >= 0xD800 && code < 0xE000) ? 0xFFFD : code;
  }

  void put_number(double value, unsigned char decimals) {
    if (value != value || value > 4e9 || value < -4e9) return put("null");
    double scale = 1;
    for (int i = 0; i < decimals; i++) scale *= 10;
    if (value < 0) put('-');
    double magnitude = (value < 0 ? -value : value) + 0.5 / scale;
    uint32_t whole = (uint32_t)magnitude;
    char digits[11];
    int count = 0;
    for (uint32_t rest = whole; count == 0 || rest; rest /= 10) digits[count++] = (char)('0' + rest % 10);
    while (count) put(digits[--count]);
    if (!decimals) return;
    put('.');
    double fraction = magnitude - whole;
    for (int i = 0; i < decimals; i++) {
      fraction *= 10;
      put((char)('0' + (int)fraction));
      fraction -= (int)fraction;
    }
  }

  Port &port_;
  unsigned long (*now_)();
  uint32_t seed_, number_ = 0, crc_ = 0;
  EdgeStatus status_ = EDGE_IDLE;
  bool acknowledged_ = false;
  unsigned char tries_ = 0;
  unsigned long begun_ = 0, sent_ = 0, wait_ = 0, timeout_ = 0;
  const char *prompt_ = NULL, *fields_ = NULL, *text_ = "";
  char code_[24] = "";
  char line_[LINE + 1];
  size_t length_ = 0;
};

#endif
