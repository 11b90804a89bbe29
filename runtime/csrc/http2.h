// The server's side of one HTTP/2 connection as gRPC uses it (RFC 9113, RFC 7541, and gRPC's PROTOCOL-HTTP2), without
// sockets or threads: bytes of the peer in, events out; answers in, bytes for the peer out. A connection and what it
// points to belong to one thread at a time.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define HTTP2_EXPORT __attribute__((visibility("default")))
#else
#define HTTP2_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct http2_connection http2_connection;

// Whose memory messages arrive in, so that they need not be copied into it: an object of some size, its bytes, and its
// end. The object of a message is the receiver's to drop.
typedef struct {
  void* (*make)(const char* none, intptr_t size);  // Null where memory is short
  char* (*bytes)(void* object);
  void (*drop)(void* object);
} http2_memory;

typedef struct {
  int64_t max_message;  // bytes of one message
  int64_t max_held;     // bytes of messages that are still arriving, of all connections that share `held`
  int64_t* held;        // how many there are; outlives the connections
  int32_t max_streams;  // open at once on a connection; what is beyond is refused and may be tried again
  int32_t max_headers;  // bytes of a call's headers, each counted as name + value + 32
  http2_memory memory;
} http2_limits;

enum http2_kind {
  HTTP2_HEADERS = 1,  // a call begins: data holds name, 0, value, 0 for each header
  HTTP2_MESSAGE = 2,  // one whole message, in object; detail is 1 where it is compressed
  HTTP2_END = 3,      // the client has said everything
  HTTP2_RESET = 4,    // the call is over and takes no answer; detail is the error code
  HTTP2_TOO_LONG = 5, // the message's length is in size; nothing more is read of this call, but it takes an answer
  HTTP2_NO_ROOM = 6,  // likewise, for max_held
};

typedef struct {
  int32_t kind;
  uint32_t stream;
  const uint8_t* data;  // valid until the next http2_receive
  void* object;
  int64_t size;
  int64_t detail;
} http2_event;

// Null where memory is short.
HTTP2_EXPORT http2_connection* http2_open(const http2_limits* limits);
HTTP2_EXPORT void http2_close(http2_connection* connection);

// Takes bytes of the peer. Returns how many events there are in *events, valid until the next call; -1 where the
// connection is at its end, with a last output to send.
HTTP2_EXPORT int64_t http2_receive(http2_connection* connection, const uint8_t* data, int64_t size,
                                   const http2_event** events);

// One message of an answer. Of a stream that is over, nothing happens.
HTTP2_EXPORT void http2_message(http2_connection* connection, uint32_t stream, const uint8_t* data, int64_t size);

// The end of an answer: trailers as name, 0, value, 0 for each.
HTTP2_EXPORT void http2_finish(http2_connection* connection, uint32_t stream, const uint8_t* trailers, int64_t size);

// Accept no more calls; those that run go on.
HTTP2_EXPORT void http2_shutdown(http2_connection* connection);

// Ask the peer for a sign of life: its answer is bytes to receive, and no event.
HTTP2_EXPORT void http2_ping(http2_connection* connection);

// While paused, answers stay here instead of growing the output.
HTTP2_EXPORT void http2_pause(http2_connection* connection, int32_t paused);

// Bytes for the peer, valid until the next call with this connection, which forgets them.
HTTP2_EXPORT const uint8_t* http2_output(http2_connection* connection, int64_t* size);

// Whether the client's first settings are here.
HTTP2_EXPORT int32_t http2_settled(const http2_connection* connection);

// Calls that are not over.
HTTP2_EXPORT int64_t http2_streams(const http2_connection* connection);

#ifdef __cplusplus
}
#endif
