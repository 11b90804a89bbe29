#include "hpack.h"

#include <array>

#include "hpack_tables.h"

namespace http2 {
namespace {

constexpr size_t kStatic = sizeof(kStaticTable) / sizeof(kStaticTable[0]);
constexpr int kEnd = 256;
constexpr size_t kEntry = 32;  // what an entry counts beyond its bytes

// The codes as a binary tree in an array: a node is a pair of children; a negative child is a symbol, ~symbol.
class HuffmanTree {
 public:
  HuffmanTree() {
    nodes_.push_back({0, 0});
    for (int symbol = 0; symbol <= kEnd; ++symbol) {
      const HuffmanCode code = kHuffman[symbol];
      int node = 0;
      for (int bit = code.length - 1; bit > 0; --bit) {
        const size_t side = code.bits >> bit & 1;
        if (nodes_[node][side] == 0) {
          nodes_[node][side] = static_cast<int>(nodes_.size());
          nodes_.push_back({0, 0});
        }
        node = nodes_[node][side];
      }
      nodes_[node][code.bits & 1] = ~symbol;
    }
  }

  bool decode(const uint8_t* data, size_t size, std::string& text) const {
    int node = 0;
    int depth = 0;      // bits since the last symbol
    bool ones = true;  // all of them
    for (size_t i = 0; i < size; ++i) {
      for (int bit = 7; bit >= 0; --bit) {
        const size_t side = data[i] >> bit & 1;
        ones = ones && side == 1;
        ++depth;
        const int next = nodes_[node][side];
        if (next >= 0) {
          node = next;
          continue;
        }
        if (~next == kEnd) return false;
        text.push_back(static_cast<char>(~next));
        node = depth = 0;
        ones = true;
      }
    }
    // what is left is padding: fewer than 8 bits, the beginning of the end's code, which is all ones
    return depth < 8 && ones;
  }

 private:
  std::vector<std::array<int, 2>> nodes_;
};

void put_integer(uint8_t flags, int prefix, size_t value, std::vector<uint8_t>& block) {
  const size_t most = (size_t{1} << prefix) - 1;
  if (value < most) {
    block.push_back(static_cast<uint8_t>(flags | value));
    return;
  }
  block.push_back(static_cast<uint8_t>(flags | most));
  for (value -= most; value >= 128; value >>= 7) block.push_back(static_cast<uint8_t>(value | 128));
  block.push_back(static_cast<uint8_t>(value));
}

}  // namespace

bool HpackDecoder::decode(const uint8_t* data, size_t size, size_t limit, std::vector<Header>& headers,
                          bool& overflow) {
  Input input{data, data + size};
  size_t total = 0;
  bool begun = false;
  overflow = false;
  while (input.at != input.end) {
    const uint8_t first = *input.at;
    Header header;
    uint64_t index = 0;
    if ((first & 0x80) != 0) {
      if (!integer(input, 7, index)) return false;
      // one byte can name thousands: what would be dropped is not copied first
      if (overflow ? index == 0 || index > kStatic + table_.size() : !lookup(index, header)) return false;
    } else if ((first & 0xe0) == 0x20) {
      // a change of the table's size stands at the beginning only
      if (begun || !integer(input, 5, index) || index > kMaxTable) return false;
      limit_ = index;
      shrink(limit_);
      continue;
    } else {
      const bool remember = (first & 0x40) != 0;
      if (!integer(input, remember ? 6 : 4, index)) return false;
      if (index != 0 && !lookup(index, header)) return false;
      if (index == 0 && !text(input, header.first)) return false;
      header.second.clear();
      if (!text(input, header.second)) return false;
      if (remember) insert(header);
    }
    begun = true;
    total += header.first.size() + header.second.size() + kEntry;
    overflow = overflow || total > limit;
    if (!overflow) {
      headers.push_back(std::move(header));
    }
  }
  return true;
}

bool HpackDecoder::lookup(uint64_t index, Header& header) const {
  if (index == 0) return false;
  if (index <= kStatic) {
    header = {kStaticTable[index - 1].name, kStaticTable[index - 1].value};
    return true;
  }
  index -= kStatic + 1;
  if (index >= table_.size()) return false;
  header = table_[index];
  return true;
}

void HpackDecoder::insert(const Header& header) {
  const size_t bytes = header.first.size() + header.second.size() + kEntry;
  if (bytes > limit_) {
    shrink(0);
    return;
  }
  shrink(limit_ - bytes);
  table_.push_front(header);
  size_ += bytes;
}

void HpackDecoder::shrink(size_t limit) {
  while (size_ > limit) {
    size_ -= table_.back().first.size() + table_.back().second.size() + kEntry;
    table_.pop_back();
  }
}

bool HpackDecoder::integer(Input& input, int prefix, uint64_t& value) {
  const uint8_t most = static_cast<uint8_t>((1 << prefix) - 1);
  value = *input.at++ & most;
  if (value < most) return true;
  for (int shift = 0; shift <= 28; shift += 7) {
    if (input.at == input.end) return false;
    const uint8_t byte = *input.at++;
    value += static_cast<uint64_t>(byte & 127) << shift;
    if ((byte & 128) == 0) return true;
  }
  return false;
}

bool HpackDecoder::text(Input& input, std::string& value) {
  static const HuffmanTree tree;
  if (input.at == input.end) return false;
  const bool huffman = (*input.at & 0x80) != 0;
  uint64_t size = 0;
  if (!integer(input, 7, size) || size > static_cast<uint64_t>(input.end - input.at)) return false;
  const uint8_t* data = input.at;
  input.at += size;
  if (huffman) return tree.decode(data, size, value);
  value.assign(reinterpret_cast<const char*>(data), size);
  return true;
}

void encode(std::string_view name, std::string_view value, std::vector<uint8_t>& block) {
  block.push_back(0);
  put_integer(0, 7, name.size(), block);
  block.insert(block.end(), name.begin(), name.end());
  put_integer(0, 7, value.size(), block);
  block.insert(block.end(), value.begin(), value.end());
}

}  // namespace http2
