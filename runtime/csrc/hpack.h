// HPACK (RFC 7541): a decoder with its dynamic table, and an encoder that needs none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace http2 {

using Header = std::pair<std::string, std::string>;

class HpackDecoder {
 public:
  // Appends the headers of a whole block. False where the block breaks the rules: the connection is lost then, because
  // both sides' tables no longer agree. Beyond `limit` bytes (name + value + 32 each) headers are dropped, not decoded
  // wrong: `overflow` says so.
  bool decode(const uint8_t* data, size_t size, size_t limit, std::vector<Header>& headers, bool& overflow);

 private:
  struct Input {
    const uint8_t* at;
    const uint8_t* end;
  };

  bool lookup(uint64_t index, Header& header) const;
  void insert(const Header& header);
  void shrink(size_t limit);
  static bool integer(Input& input, int prefix, uint64_t& value);
  static bool text(Input& input, std::string& value);

  static constexpr size_t kMaxTable = 4096;  // SETTINGS_HEADER_TABLE_SIZE, which we leave at its default
  std::deque<Header> table_;                 // newest first
  size_t size_ = 0;
  size_t limit_ = kMaxTable;
};

// Appends a header as a literal that no table remembers.
void encode(std::string_view name, std::string_view value, std::vector<uint8_t>& block);

}  // namespace http2
