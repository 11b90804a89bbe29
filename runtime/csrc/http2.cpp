#include "http2.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "hpack.h"

namespace http2 {
namespace {

enum Type : uint8_t {
  kData = 0,
  kHeaders = 1,
  kPriority = 2,
  kReset = 3,
  kSettings = 4,
  kPush = 5,
  kPing = 6,
  kGoAway = 7,
  kWindowUpdate = 8,
  kContinuation = 9,
};
enum Flag : uint8_t { kEndStream = 1, kAck = 1, kEndHeaders = 4, kPadded = 8, kHasPriority = 32 };
enum Code : uint32_t {
  kNoError = 0,
  kProtocolError = 1,
  kInternalError = 2,
  kFlowControlError = 3,
  kStreamClosed = 5,
  kFrameSizeError = 6,
  kRefusedStream = 7,
  kCancel = 8,
  kCompressionError = 9,
  kEnhanceYourCalm = 11,
};
enum Setting : uint16_t { kEnablePush = 2, kMaxStreams = 3, kInitialWindow = 4, kMaxFrame = 5, kMaxHeaders = 6 };

constexpr std::string_view kPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr size_t kFrameHeader = 9;
constexpr int64_t kDefaultWindow = 65535;
constexpr int64_t kMostWindow = 0x7fffffff;
constexpr int64_t kStreamWindow = 4 << 20;
constexpr int64_t kConnectionWindow = 16 << 20;
constexpr size_t kOurMaxFrame = 1 << 18;  // a picture in one frame instead of ten
constexpr size_t kMaxBlock = 1 << 16;     // of one call's headers, compressed
constexpr size_t kMaxControl = 1 << 16;   // acknowledgements that a peer who does not read may pile up
constexpr int64_t kMaxResets = 10000;     // calls that a client takes back, beyond those it waits for
constexpr size_t kPrefix = 5;             // gRPC: compressed or not, and the length of the message

uint32_t read32(const uint8_t* p) {
  return static_cast<uint32_t>(p[0]) << 24 | static_cast<uint32_t>(p[1]) << 16 | static_cast<uint32_t>(p[2]) << 8 | p[3];
}

void put32(std::vector<uint8_t>& out, uint32_t value) {
  const uint8_t bytes[] = {static_cast<uint8_t>(value >> 24), static_cast<uint8_t>(value >> 16),
                           static_cast<uint8_t>(value >> 8), static_cast<uint8_t>(value)};
  out.insert(out.end(), bytes, bytes + 4);
}

// A message in the receiver's memory, which grows as its bytes come.
class Message {
 public:
  explicit Message(const http2_memory* memory) : memory_(memory) {}
  ~Message() {
    if (object_ != nullptr) memory_->drop(object_);
  }
  Message(Message&& other) noexcept : memory_(other.memory_) { swap(other); }
  Message& operator=(Message&& other) noexcept {
    swap(other);
    return *this;
  }

  size_t size() const { return size_; }
  size_t capacity() const { return capacity_; }

  // Room for `capacity` bytes, no more and no less.
  void reserve(size_t capacity) {
    if (object_ != nullptr && capacity == capacity_) return;
    Message grown(memory_);
    grown.object_ = memory_->make(nullptr, static_cast<intptr_t>(capacity));
    if (grown.object_ == nullptr) throw std::bad_alloc();
    grown.capacity_ = capacity;
    grown.size_ = size_;
    if (size_ > 0) std::memcpy(memory_->bytes(grown.object_), memory_->bytes(object_), size_);
    swap(grown);
  }

  // At most `whole` bytes come in all.
  void append(const uint8_t* data, size_t size, size_t whole) {
    if (size_ + size > capacity_) reserve(std::min(whole, std::max(size_ + size, 2 * capacity_)));
    std::memcpy(memory_->bytes(object_) + size_, data, size);
    size_ += size;
  }

  // The object, as large as the message, which is the caller's from now on.
  void* release() {
    reserve(size_);
    size_ = capacity_ = 0;
    return std::exchange(object_, nullptr);
  }

 private:
  void swap(Message& other) {
    std::swap(object_, other.object_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  const http2_memory* memory_;
  void* object_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

struct Stream {
  explicit Stream(const http2_memory* memory) : message(memory) {}

  // from the client
  int64_t receive_window = kStreamWindow;
  int64_t consumed = 0;  // not yet given back as window
  bool ended = false;    // the client has said everything
  bool deaf = false;     // what else it says is thrown away
  uint8_t prefix[kPrefix];
  size_t prefix_size = 0;
  size_t length = 0;  // of the message that is arriving
  Message message;
  // to the client
  int64_t send_window = kDefaultWindow;
  bool begun = false;     // headers are out
  bool finished = false;  // trailers are known
  bool queued = false;
  std::string waiting;  // data that the windows do not let out yet
  size_t sent = 0;      // of it
  std::vector<uint8_t> trailers;
};

// Ends a connection from wherever the fault is found.
struct Fault {
  Code code;
};

bool token(std::string_view name) {
  if (name.empty()) return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || (c != 0 && std::strchr("!#$%&'*+-.^_`|~", c) != nullptr);
  });
}

bool printable(std::string_view value) {
  return std::all_of(value.begin(), value.end(), [](char c) { return c != 0 && c != '\r' && c != '\n'; });
}

// RFC 9113, 8.2 and 8.3: whether headers make a request.
bool well_formed(const std::vector<Header>& headers) {
  int method = 0;
  int scheme = 0;
  int path = 0;
  int authority = 0;
  bool regular = false;
  for (const auto& [name, value] : headers) {
    if (!printable(value)) return false;
    if (!name.empty() && name[0] == ':') {
      int* count = name == ":method"      ? &method
                   : name == ":scheme"    ? &scheme
                   : name == ":path"      ? &path
                   : name == ":authority" ? &authority
                                          : nullptr;
      if (count == nullptr || regular || ++*count > 1) return false;
      continue;
    }
    regular = true;
    if (!token(name)) return false;
    if (name == "connection" || name == "keep-alive" || name == "proxy-connection" || name == "transfer-encoding" ||
        name == "upgrade") {
      return false;
    }
    if (name == "te" && value != "trailers") return false;
  }
  return method == 1 && scheme == 1 && path == 1;
}

}  // namespace

class Connection {
 public:
  explicit Connection(const http2_limits& limits) : limits_(limits) {
    begin_frame(kSettings, 0, 0, 4 * 6);
    put_setting(kMaxStreams, static_cast<uint32_t>(limits.max_streams));
    put_setting(kInitialWindow, static_cast<uint32_t>(kStreamWindow));
    put_setting(kMaxFrame, static_cast<uint32_t>(kOurMaxFrame));
    put_setting(kMaxHeaders, static_cast<uint32_t>(limits.max_headers));
    window_update(0, kConnectionWindow - kDefaultWindow);
  }

  ~Connection() {
    drop_messages();
    for (auto& [id, stream] : streams_) release(stream);
  }

  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  int64_t receive(const uint8_t* data, size_t size, const http2_event** events) {
    events_.clear();
    handed_ = false;
    blocks_.clear();
    if (over_) return -1;
    try {
      take(data, size);
    } catch (const Fault& fault) {
      drop_messages();
      go_away(fault.code);
      over_ = true;
      return -1;
    }
    pump();
    *events = events_.data();
    handed_ = true;
    return static_cast<int64_t>(events_.size());
  }

  void message(uint32_t id, const uint8_t* data, size_t size) {
    forget_output();
    const auto found = streams_.find(id);
    if (found == streams_.end() || found->second.finished) return;
    Stream& stream = found->second;
    begin_answer(id, stream, false);
    const uint8_t prefix[] = {0, static_cast<uint8_t>(size >> 24), static_cast<uint8_t>(size >> 16),
                              static_cast<uint8_t>(size >> 8), static_cast<uint8_t>(size)};
    stream.waiting.append(reinterpret_cast<const char*>(prefix), kPrefix);
    stream.waiting.append(reinterpret_cast<const char*>(data), size);
    queue(id, stream);
    pump();
  }

  void finish(uint32_t id, const char* trailers, size_t size) {
    forget_output();
    const auto found = streams_.find(id);
    if (found == streams_.end() || found->second.finished) return;
    Stream& stream = found->second;
    stream.finished = true;
    if (!stream.begun) begin_block(stream.trailers);
    for (const char *at = trailers, *end = trailers + size; at < end;) {
      const std::string_view name(at, strnlen(at, end - at));
      at = std::min(end, at + name.size() + 1);
      const std::string_view value(at, strnlen(at, end - at));
      at = std::min(end, at + value.size() + 1);
      encode(name, value, stream.trailers);
    }
    stream.begun = true;
    queue(id, stream);
    pump();
  }

  void shutdown() {
    forget_output();
    if (over_ || refusing_) return;
    go_away(kNoError);
    refusing_ = true;
  }

  void ping() {
    forget_output();
    if (over_) return;
    begin_frame(kPing, 0, 0, 8);
    out_.insert(out_.end(), 8, 0);
  }

  void pause(bool paused) {
    paused_ = paused;
    if (!paused) {
      forget_output();
      pump();
    }
  }

  const uint8_t* output(int64_t* size) {
    forget_output();
    *size = static_cast<int64_t>(out_.size());
    taken_ = true;
    return out_.data();
  }

  // Nothing can be relied upon any more.
  void fail() { over_ = true; }

  bool settled() const { return settled_; }

  int64_t streams() const { return static_cast<int64_t>(streams_.size()); }

 private:
  // Reading

  void take(const uint8_t* data, size_t size) {
    forget_output();
    while (size > 0) {
      size_t used = 0;
      if (preface_ < kPreface.size()) {
        used = std::min(size, kPreface.size() - preface_);
        if (std::memcmp(data, kPreface.data() + preface_, used) != 0) throw Fault{kProtocolError};
        preface_ += used;
      } else if (head_size_ < kFrameHeader) {
        used = std::min(size, kFrameHeader - head_size_);
        std::memcpy(head_ + head_size_, data, used);
        head_size_ += used;
        if (head_size_ == kFrameHeader) begin();
      } else if (type_ == kData) {
        used = std::min(size, left_);
        payload(data, used);
        left_ -= used;
        if (left_ == 0) end_data();
      } else {
        used = std::min(size, left_);
        frame_.insert(frame_.end(), data, data + used);
        left_ -= used;
        if (left_ == 0) end();
      }
      data += used;
      size -= used;
    }
  }

  void begin() {
    left_ = static_cast<size_t>(head_[0]) << 16 | static_cast<size_t>(head_[1]) << 8 | head_[2];
    type_ = head_[3];
    flags_ = head_[4];
    id_ = read32(head_ + 5) & 0x7fffffff;
    frame_.clear();
    if (left_ > kOurMaxFrame) throw Fault{kFrameSizeError};
    if (!settled_ && (type_ != kSettings || (flags_ & kAck) != 0)) throw Fault{kProtocolError};
    if (block_stream_ != 0 && (type_ != kContinuation || id_ != block_stream_)) throw Fault{kProtocolError};
    if (type_ == kData) {
      begin_data();
      if (left_ == 0) end_data();
      return;
    }
    // only headers may be long
    if (type_ != kHeaders && type_ != kContinuation && left_ > 16384) throw Fault{kFrameSizeError};
    if ((type_ == kHeaders || type_ == kContinuation) && block_.size() + left_ > kMaxBlock) {
      throw Fault{kEnhanceYourCalm};
    }
    if (left_ == 0) end();
  }

  void begin_data() {
    if (id_ == 0 || id_ > last_id_) throw Fault{kProtocolError};
    connection_window_ -= static_cast<int64_t>(left_);
    if (connection_window_ < 0) throw Fault{kFlowControlError};
    pad_known_ = (flags_ & kPadded) == 0;
    pad_ = 0;
    if (!pad_known_ && left_ == 0) throw Fault{kFrameSizeError};
    const auto found = streams_.find(id_);
    if (found == streams_.end()) return;  // it ended while this was under way
    Stream& stream = found->second;
    if (stream.ended) return reset(id_, kStreamClosed);
    stream.receive_window -= static_cast<int64_t>(left_);
    if (stream.receive_window < 0) reset(id_, kFlowControlError);
  }

  void payload(const uint8_t* data, size_t size) {
    consumed_ += static_cast<int64_t>(size);
    const auto found = streams_.find(id_);
    if (found != streams_.end()) found->second.consumed += static_cast<int64_t>(size);
    size_t remaining = left_;  // of the frame, from data on
    if (!pad_known_ && size > 0) {
      pad_known_ = true;
      pad_ = *data++;
      --size;
      --remaining;
      if (pad_ > remaining) throw Fault{kProtocolError};
    }
    const size_t useful = std::min(size, remaining - std::min(remaining, pad_));
    if (found != streams_.end()) read_messages(id_, found->second, data, useful);
  }

  void end_data() {
    head_size_ = 0;
    if (consumed_ >= kConnectionWindow / 2) {
      window_update(0, consumed_);
      connection_window_ += consumed_;
      consumed_ = 0;
    }
    const auto found = streams_.find(id_);
    if (found == streams_.end()) return;
    Stream& stream = found->second;
    if ((flags_ & kEndStream) != 0) return end_of_client(id_, stream);
    if (stream.consumed >= kStreamWindow / 2) {
      window_update(id_, stream.consumed);
      stream.receive_window += stream.consumed;
      stream.consumed = 0;
    }
  }

  void read_messages(uint32_t id, Stream& stream, const uint8_t* data, size_t size) {
    while (size > 0 && !stream.deaf) {
      if (stream.prefix_size < kPrefix) {
        const size_t used = std::min(size, kPrefix - stream.prefix_size);
        std::memcpy(stream.prefix + stream.prefix_size, data, used);
        stream.prefix_size += used;
        data += used;
        size -= used;
        if (stream.prefix_size < kPrefix) return;
        stream.length = read32(stream.prefix + 1);
        if (static_cast<int64_t>(stream.length) > limits_.max_message) {
          stream.deaf = true;
          event(HTTP2_TOO_LONG, id, nullptr, static_cast<int64_t>(stream.length), 0);
          return;
        }
        if (stream.length == 0) deliver(id, stream);
        continue;
      }
      const size_t used = std::min(size, stream.length - stream.message.size());
      const auto before = static_cast<int64_t>(stream.message.capacity());
      // most messages come whole in a few frames; memory for a long one is not taken before its bytes are there
      if (stream.length <= kOurMaxFrame) stream.message.reserve(stream.length);
      stream.message.append(data, used, stream.length);
      *limits_.held += static_cast<int64_t>(stream.message.capacity()) - before;
      if (*limits_.held > limits_.max_held) {
        release(stream);
        stream.deaf = true;
        event(HTTP2_NO_ROOM, id, nullptr, static_cast<int64_t>(stream.length), 0);
        return;
      }
      data += used;
      size -= used;
      if (stream.message.size() == stream.length) deliver(id, stream);
    }
  }

  void deliver(uint32_t id, Stream& stream) {
    *limits_.held -= static_cast<int64_t>(stream.message.capacity());
    const auto size = static_cast<int64_t>(stream.message.size());
    void* object = stream.message.release();
    stream.prefix_size = 0;
    try {
      events_.push_back({HTTP2_MESSAGE, id, nullptr, object, size, stream.prefix[0] & 1});
    } catch (const std::bad_alloc&) {
      limits_.memory.drop(object);
      throw;
    }
  }

  void release(Stream& stream) {
    *limits_.held -= static_cast<int64_t>(stream.message.capacity());
    stream.message = Message(&limits_.memory);
  }

  // Of events that nobody will see.
  void drop_messages() {
    for (const http2_event& one : events_) {
      if (!handed_ && one.object != nullptr) limits_.memory.drop(one.object);
    }
    events_.clear();
  }

  void end_of_client(uint32_t id, Stream& stream) {
    stream.ended = true;
    if (!stream.deaf) event(HTTP2_END, id, nullptr, 0, 0);
  }

  void end() {
    head_size_ = 0;
    switch (type_) {
      case kHeaders:
        return headers();
      case kPriority:
        if (id_ == 0) throw Fault{kProtocolError};
        if (frame_.size() != 5) reset(id_, kFrameSizeError);
        return;
      case kReset:
        return client_reset();
      case kSettings:
        return settings();
      case kPush:
        throw Fault{kProtocolError};
      case kPing:
        return answer_ping();
      case kGoAway:
        if (id_ != 0) throw Fault{kProtocolError};
        return;
      case kWindowUpdate:
        return window();
      case kContinuation:
        if (block_stream_ == 0) throw Fault{kProtocolError};
        block_.insert(block_.end(), frame_.begin(), frame_.end());
        // without an end they could come for ever, all of them empty
        if (++continuations_ > 64) throw Fault{kEnhanceYourCalm};
        if ((flags_ & kEndHeaders) != 0) block(block_ends_);
        return;
      default:
        return;  // RFC 9113, 4.1: unknown frames are ignored
    }
  }

  void headers() {
    if (id_ == 0 || id_ % 2 == 0) throw Fault{kProtocolError};
    size_t from = 0;
    size_t to = frame_.size();
    if ((flags_ & kPadded) != 0) {
      if (to < 1) throw Fault{kFrameSizeError};
      const size_t pad = frame_[0];
      from = 1;
      if (pad > to - from) throw Fault{kProtocolError};
      to -= pad;
    }
    if ((flags_ & kHasPriority) != 0) {
      if (to - from < 5) throw Fault{kFrameSizeError};
      from += 5;
    }
    block_.assign(frame_.begin() + static_cast<int64_t>(from), frame_.begin() + static_cast<int64_t>(to));
    block_stream_ = id_;
    block_ends_ = (flags_ & kEndStream) != 0;
    continuations_ = 0;
    if ((flags_ & kEndHeaders) != 0) block(block_ends_);
  }

  // A whole header block of block_stream_.
  void block(bool ends) {
    const uint32_t id = block_stream_;
    block_stream_ = 0;
    std::vector<Header> headers;
    bool overflow = false;
    if (!hpack_.decode(block_.data(), block_.size(), static_cast<size_t>(limits_.max_headers), headers, overflow)) {
      throw Fault{kCompressionError};
    }
    block_.clear();
    if (id <= last_id_) {
      // a client's trailers, which gRPC does not use, or headers of a stream that ended meanwhile
      const auto found = streams_.find(id);
      if (found == streams_.end()) return;
      if (found->second.ended) return reset(id, kStreamClosed);
      if (!ends) return reset(id, kProtocolError);
      return end_of_client(id, found->second);
    }
    last_id_ = id;
    if (refusing_) return send_reset(id, kRefusedStream);
    if (overflow) return send_reset(id, kEnhanceYourCalm);
    if (!well_formed(headers)) return send_reset(id, kProtocolError);
    if (streams_.size() >= static_cast<size_t>(limits_.max_streams)) return send_reset(id, kRefusedStream);
    Stream& stream = streams_.emplace(id, &limits_.memory).first->second;
    stream.send_window = initial_window_;
    std::string flat;
    for (const auto& [name, value] : headers) {
      flat.append(name).push_back('\0');
      flat.append(value).push_back('\0');
    }
    blocks_.push_back(std::make_unique<std::string>(std::move(flat)));
    const std::string& kept = *blocks_.back();
    event(HTTP2_HEADERS, id, reinterpret_cast<const uint8_t*>(kept.data()), static_cast<int64_t>(kept.size()), 0);
    if (ends) end_of_client(id, stream);
  }

  void client_reset() {
    if (id_ == 0 || id_ > last_id_) throw Fault{kProtocolError};
    if (frame_.size() != 4) throw Fault{kFrameSizeError};
    const auto found = streams_.find(id_);
    if (found == streams_.end()) return;
    if (!found->second.finished && ++resets_ - 2 * answered_ > kMaxResets) throw Fault{kEnhanceYourCalm};
    event(HTTP2_RESET, id_, nullptr, 0, read32(frame_.data()));
    erase(found);
  }

  void settings() {
    if (id_ != 0) throw Fault{kProtocolError};
    settled_ = true;
    if ((flags_ & kAck) != 0) {
      if (!frame_.empty()) throw Fault{kFrameSizeError};
      return;
    }
    if (frame_.size() % 6 != 0) throw Fault{kFrameSizeError};
    for (size_t at = 0; at < frame_.size(); at += 6) {
      const uint32_t value = read32(&frame_[at + 2]);
      switch (frame_[at] << 8 | frame_[at + 1]) {
        case kEnablePush:
          if (value > 1) throw Fault{kProtocolError};
          break;
        case kInitialWindow:
          if (value > kMostWindow) throw Fault{kFlowControlError};
          for (auto& [id, stream] : streams_) {
            stream.send_window += static_cast<int64_t>(value) - initial_window_;
            if (stream.send_window > kMostWindow) throw Fault{kFlowControlError};
            queue(id, stream);
          }
          initial_window_ = value;
          break;
        case kMaxFrame:
          if (value < 16384 || value > 16777215) throw Fault{kProtocolError};
          max_frame_ = value;
          break;
        default:
          break;
      }
    }
    control(kSettings, kAck, 0, 0);
  }

  void answer_ping() {
    if (id_ != 0) throw Fault{kProtocolError};
    if (frame_.size() != 8) throw Fault{kFrameSizeError};
    if ((flags_ & kAck) != 0) return;
    control(kPing, kAck, 0, 8);
    out_.insert(out_.end(), frame_.begin(), frame_.end());
  }

  void window() {
    if (frame_.size() != 4) throw Fault{kFrameSizeError};
    const int64_t more = read32(frame_.data()) & 0x7fffffff;
    if (id_ == 0) {
      send_window_ += more;
      if (more == 0) throw Fault{kProtocolError};
      if (send_window_ > kMostWindow) throw Fault{kFlowControlError};
      return;
    }
    if (id_ > last_id_) throw Fault{kProtocolError};
    const auto found = streams_.find(id_);
    if (found == streams_.end()) return;
    found->second.send_window += more;
    if (more == 0) return reset(id_, kProtocolError);
    if (found->second.send_window > kMostWindow) return reset(id_, kFlowControlError);
    queue(id_, found->second);
  }

  void event(int32_t kind, uint32_t id, const uint8_t* data, int64_t size, int64_t detail) {
    events_.push_back({kind, id, data, nullptr, size, detail});
  }

  // Writing

  void forget_output() {
    if (!taken_) return;
    out_.clear();
    control_ = 0;
    taken_ = false;
  }

  void begin_frame(uint8_t type, uint8_t flags, uint32_t id, size_t size) {
    const uint8_t head[] = {static_cast<uint8_t>(size >> 16), static_cast<uint8_t>(size >> 8),
                            static_cast<uint8_t>(size), type, flags};
    out_.insert(out_.end(), head, head + sizeof head);
    put32(out_, id);
  }

  // A frame that a peer can call forth: one that does not read must not fill the memory with them.
  void control(uint8_t type, uint8_t flags, uint32_t id, size_t size) {
    begin_frame(type, flags, id, size);
    control_ += kFrameHeader + size;
    if (paused_ && control_ > kMaxControl) throw Fault{kEnhanceYourCalm};
  }

  void put_setting(Setting name, uint32_t value) {
    out_.push_back(static_cast<uint8_t>(name >> 8));
    out_.push_back(static_cast<uint8_t>(name));
    put32(out_, value);
  }

  void window_update(uint32_t id, int64_t more) {
    begin_frame(kWindowUpdate, 0, id, 4);
    put32(out_, static_cast<uint32_t>(more));
  }

  void send_reset(uint32_t id, Code code) {
    control(kReset, 0, id, 4);
    put32(out_, code);
  }

  // Ends a stream for a fault of the client's.
  void reset(uint32_t id, Code code) {
    send_reset(id, code);
    const auto found = streams_.find(id);
    if (found == streams_.end()) return;
    event(HTTP2_RESET, id, nullptr, 0, code);
    erase(found);
  }

  void go_away(Code code) {
    begin_frame(kGoAway, 0, 0, 8);
    put32(out_, last_id_);
    put32(out_, code);
  }

  static void begin_block(std::vector<uint8_t>& block) {
    block.push_back(0x88);  // :status 200 of the static table
    encode("content-type", "application/grpc", block);
  }

  void begin_answer(uint32_t id, Stream& stream, bool ends) {
    if (stream.begun) return;
    stream.begun = true;
    std::vector<uint8_t> block;
    begin_block(block);
    put_block(id, block, ends);
  }

  void put_block(uint32_t id, const std::vector<uint8_t>& block, bool ends) {
    size_t at = 0;
    do {
      const size_t size = std::min(block.size() - at, max_frame_);
      const uint8_t last = at + size == block.size() ? kEndHeaders : 0;
      const uint8_t first = at == 0 && ends ? kEndStream : 0;
      begin_frame(at == 0 ? kHeaders : kContinuation, static_cast<uint8_t>(last | first), id, size);
      out_.insert(out_.end(), block.begin() + static_cast<int64_t>(at), block.begin() + static_cast<int64_t>(at + size));
      at += size;
    } while (at < block.size());
  }

  void queue(uint32_t id, Stream& stream) {
    if (stream.queued || (stream.waiting.empty() && !stream.finished)) return;
    stream.queued = true;
    ready_.push_back(id);
  }

  // Lets out what the windows allow, one frame a stream in turn.
  void pump() {
    if (paused_) return;
    size_t blocked = 0;
    while (blocked < ready_.size()) {
      const uint32_t id = ready_.front();
      ready_.pop_front();
      const auto found = streams_.find(id);
      if (found == streams_.end()) continue;
      Stream& stream = found->second;
      const size_t waiting = stream.waiting.size() - stream.sent;
      const int64_t window = std::max<int64_t>(0, std::min(stream.send_window, send_window_));
      const size_t size = std::min({waiting, static_cast<size_t>(window), max_frame_});
      if (size > 0) {
        begin_frame(kData, 0, id, size);
        const char* from = stream.waiting.data() + stream.sent;
        out_.insert(out_.end(), from, from + size);
        stream.sent += size;
        stream.send_window -= static_cast<int64_t>(size);
        send_window_ -= static_cast<int64_t>(size);
      }
      if (stream.sent < stream.waiting.size()) {
        if (stream.send_window <= 0) {
          stream.queued = false;  // its window's update queues it again
          continue;
        }
        ready_.push_back(id);
        blocked = send_window_ <= 0 ? blocked + 1 : 0;
        continue;
      }
      stream.waiting.clear();
      stream.sent = 0;
      stream.queued = false;
      if (!stream.finished) continue;
      put_block(id, stream.trailers, true);
      ++answered_;
      // the rest of a question that is answered need not come
      if (!stream.ended) send_reset(id, kNoError);
      erase(found);
    }
  }

  void erase(std::unordered_map<uint32_t, Stream>::iterator found) {
    release(found->second);
    streams_.erase(found);
  }

  const http2_limits limits_;
  bool over_ = false;
  bool refusing_ = false;
  bool paused_ = false;
  // reading
  size_t preface_ = 0;
  bool settled_ = false;  // the client's first settings are here
  uint8_t head_[kFrameHeader];
  size_t head_size_ = 0;
  size_t left_ = 0;  // of the frame's payload
  uint8_t type_ = 0;
  uint8_t flags_ = 0;
  uint32_t id_ = 0;
  bool pad_known_ = true;
  size_t pad_ = 0;
  std::vector<uint8_t> frame_;
  std::vector<uint8_t> block_;
  uint32_t block_stream_ = 0;
  bool block_ends_ = false;
  int continuations_ = 0;
  uint32_t last_id_ = 0;
  int64_t connection_window_ = kConnectionWindow;
  int64_t consumed_ = 0;
  int64_t resets_ = 0;
  int64_t answered_ = 0;
  HpackDecoder hpack_;
  std::unordered_map<uint32_t, Stream> streams_;
  std::vector<http2_event> events_;
  bool handed_ = false;  // to the receiver, with the objects in them
  std::vector<std::unique_ptr<std::string>> blocks_;
  // writing
  int64_t send_window_ = kDefaultWindow;
  int64_t initial_window_ = kDefaultWindow;
  size_t max_frame_ = 16384;
  std::deque<uint32_t> ready_;
  std::vector<uint8_t> out_;
  size_t control_ = 0;
  bool taken_ = false;
};

}  // namespace http2

struct http2_connection : http2::Connection {
  using Connection::Connection;
};

extern "C" {

http2_connection* http2_open(const http2_limits* limits) {
  try {
    return new http2_connection(*limits);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void http2_close(http2_connection* connection) { delete connection; }

int64_t http2_receive(http2_connection* connection, const uint8_t* data, int64_t size, const http2_event** events) {
  try {
    return connection->receive(data, static_cast<size_t>(size), events);
  } catch (const std::bad_alloc&) {
    connection->fail();
    return -1;
  }
}

void http2_message(http2_connection* connection, uint32_t stream, const uint8_t* data, int64_t size) {
  try {
    connection->message(stream, data, static_cast<size_t>(size));
  } catch (const std::bad_alloc&) {
    connection->fail();
  }
}

void http2_finish(http2_connection* connection, uint32_t stream, const uint8_t* trailers, int64_t size) {
  try {
    connection->finish(stream, reinterpret_cast<const char*>(trailers), static_cast<size_t>(size));
  } catch (const std::bad_alloc&) {
    connection->fail();
  }
}

void http2_shutdown(http2_connection* connection) { connection->shutdown(); }

void http2_ping(http2_connection* connection) { connection->ping(); }

void http2_pause(http2_connection* connection, int32_t paused) { connection->pause(paused != 0); }

const uint8_t* http2_output(http2_connection* connection, int64_t* size) { return connection->output(size); }

int32_t http2_settled(const http2_connection* connection) { return connection->settled() ? 1 : 0; }

int64_t http2_streams(const http2_connection* connection) { return connection->streams(); }

}  // extern "C"
