// The line about a thread's last failure, which mcheads_error() returns.
#pragma once

namespace trivium {

// Remember a line, formatted as by printf, and return the status.
int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* last_error();

}  // namespace trivium
