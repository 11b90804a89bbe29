// A million odd frames for the HTTP/2 engine, under the sanitizers: valid ones, mutated ones and noise, in pieces of any
// size, with answers in between. Ends with 0 where nothing was found and nothing is held.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../runtime/csrc/http2.h"

namespace {

std::mt19937 random_bits(1);

size_t below(size_t end) { return random_bits() % end; }

struct Object {
  std::vector<char> bytes;
};
int64_t objects = 0;

void* make(const char*, intptr_t size) {
  ++objects;
  return new Object{std::vector<char>(static_cast<size_t>(size))};
}
char* bytes(void* object) { return static_cast<Object*>(object)->bytes.data(); }
void drop(void* object) {
  --objects;
  delete static_cast<Object*>(object);
}

std::string frame(unsigned kind, unsigned flags, unsigned stream, const std::string& payload) {
  std::string head(9, '\0');
  for (int i = 0; i < 3; ++i) head[i] = static_cast<char>(payload.size() >> (16 - 8 * i));
  head[3] = static_cast<char>(kind);
  head[4] = static_cast<char>(flags);
  for (int i = 0; i < 4; ++i) head[5 + i] = static_cast<char>(stream >> (24 - 8 * i));
  return head + payload;
}

std::string noise(size_t size) {
  std::string out(size, '\0');
  for (char& one : out) one = static_cast<char>(random_bits());
  return out;
}

std::string literal(const std::string& name, const std::string& value) {
  return std::string(1, '\x40') + static_cast<char>(name.size()) + name + static_cast<char>(value.size()) + value;
}

std::string odd_frame(unsigned stream) {
  static const std::string request = literal(":method", "POST") + literal(":scheme", "http") + literal(":path", "/a/b") +
                                     literal("content-type", "application/grpc");
  // most frames are as they should be, or a connection would not live to see the others
  switch (below(20) ? below(5) : 5 + below(7)) {
    case 0:
    case 1:
    case 2:
      return frame(1, 4 | below(2), stream, request);
    case 3:
    case 4: {
      const std::string message = noise(below(20) ? below(300) : 0);
      std::string prefix(5, '\0');
      prefix[3] = static_cast<char>(message.size() >> 8);
      prefix[4] = static_cast<char>(message.size());
      return frame(0, below(2), stream, prefix + message);
    }
    case 5: {
      std::string broken = frame(1, 4, stream, request);
      broken[below(broken.size())] = static_cast<char>(random_bits());
      return broken;
    }
    case 6:
      return frame(8, 0, below(2) ? stream : 0, noise(1).insert(0, 3, '\0'));
    case 7:
      return frame(3, 0, stream, std::string(4, '\0'));
    case 8:
      return frame(4, 0, 0, std::string("\0\4\0\0", 4) + noise(1) + noise(1));
    case 9:
      return frame(below(12), below(64), below(3) ? stream : 0, noise(below(40)));
    case 10:
      return frame(0, 8, stream, noise(1 + below(40)));
    default:
      return frame(6, 0, 0, noise(8));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int connections = argc > 1 ? std::atoi(argv[1]) : 40000;
  int64_t held = 0;
  int64_t seen[7] = {};
  for (int round = 0; round < connections; ++round) {
    const http2_limits limits = {1 << 16, 1 << 18, &held, 20, 4096, {make, bytes, drop}};
    http2_connection* connection = http2_open(&limits);
    std::string input = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, "");
    for (unsigned i = 0; i < 25; ++i) input += odd_frame(1 + 2 * (below(8) ? i / 2 : below(i + 1)));
    size_t at = 0;
    while (at < input.size()) {
      const size_t size = std::min(input.size() - at, 1 + below(200));
      // a copy of its own, so that a read beyond it is found
      const std::vector<uint8_t> piece(input.begin() + static_cast<long>(at), input.begin() + static_cast<long>(at + size));
      at += size;
      const http2_event* events = nullptr;
      const int64_t count = http2_receive(connection, piece.data(), static_cast<int64_t>(size), &events);
      for (int64_t i = 0; i < count; ++i) {
        const http2_event one = events[i];
        ++seen[one.kind];
        if (one.object != nullptr) drop(one.object);
      }
      for (int64_t i = 0; i < count; ++i) {
        if (below(3) == 0) http2_pause(connection, static_cast<int32_t>(below(2)));
        const std::string answer = noise(below(100));
        const std::string trailers("grpc-status\0000\0", 14);
        const auto stream = static_cast<uint32_t>(1 + 2 * below(25));
        if (below(2)) http2_message(connection, stream, reinterpret_cast<const uint8_t*>(answer.data()), static_cast<int64_t>(answer.size()));
        if (below(2)) http2_finish(connection, stream, reinterpret_cast<const uint8_t*>(trailers.data()), static_cast<int64_t>(trailers.size()));
      }
      if (below(50) == 0) http2_shutdown(connection);
      int64_t output = 0;
      const uint8_t* data = http2_output(connection, &output);
      int sum = 0;
      for (int64_t i = 0; i < output; ++i) sum += data[i];
      if (sum < 0) return 2;
      if (count < 0) break;
    }
    http2_close(connection);
  }
  std::printf("headers %lld messages %lld ends %lld resets %lld too long %lld no room %lld\n", (long long)seen[1],
              (long long)seen[2], (long long)seen[3], (long long)seen[4], (long long)seen[5], (long long)seen[6]);
  if (held != 0 || objects != 0) {
    std::fprintf(stderr, "%lld bytes and %lld objects are still held\n", (long long)held, (long long)objects);
    return 1;
  }
  return seen[1] > 0 && seen[2] > 0 && seen[3] > 0 && seen[4] > 0 ? 0 : 3;
}
