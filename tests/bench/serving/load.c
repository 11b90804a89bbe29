// The load generator: one thread, epoll, one prepared request, over gRPC (HTTP/2 with prior knowledge) or HTTP/1.1.
//
// Written in C because clients and server share the machine's cores: what the client burns, the server does not get.
// A request costs it some tens of microseconds, nearly all of them the kernel's, and the same for every server.
//
//   load HOST PORT grpc|http PATH CONTENT_TYPE BODY CONNECTIONS STREAMS SECONDS RATE fixed|poisson SEED LATENCIES ANSWER
//
// RATE 0 is a closed loop: each of CONNECTIONS * STREAMS clients asks again when it has its answer. Otherwise requests
// start RATE times a second whatever the server does, and latency counts from the moment a request was meant to start,
// so that a server that stalls cannot hide the requests it kept from starting; SEED is of the moments that are random.
// LATENCIES receives float64 seconds of every answered request, ANSWER the body of the first answer; standard output
// one line of JSON.
//
// Of HTTP/2 (RFC 9113) it knows what a gRPC server says to a client that keeps the rules: flow control, SETTINGS and
// PING. Its dynamic header table is told to be empty, so trailers are literals, and grpc-status can be read in them.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4 };
enum { MAX_IOV = 256, FRAME_HEAD = 9, RECEIVE = 1 << 18, CONTROL = 4096, WINDOW = 0x7fffffff };
static const double DRAIN_SECONDS = 30;

typedef struct {
    uint32_t id;       // of the HTTP/2 stream, 0 before its HEADERS
    bool busy, headed; // a request is under way; its HEADERS have been queued
    size_t sent;       // bytes of the body that have been queued
    int64_t window;    // bytes of the body that the server takes on this stream
    size_t received;   // bytes of the answer's body
    double start;      // when the request was meant to start
} Stream;

typedef struct {
    int fd;
    Stream *streams;
    uint32_t next_id;
    int64_t window, initial_window; // HTTP/2 flow control towards the server
    size_t max_frame, unacknowledged;
    bool introduced;        // the server has put our headers into its table
    uint8_t control[CONTROL]; // small frames to send first
    size_t controls;
    uint8_t sending[CONTROL]; // the ones that the iovecs point to
    uint8_t heads[MAX_IOV][FRAME_HEAD];
    struct iovec iov[MAX_IOV];
    int iovs, iov_at;
    uint8_t in[RECEIVE];
    size_t ins;
    size_t http_left; // bytes of the HTTP/1.1 answer's body still to come
    bool http_body, http_ok;
} Connection;

static bool is_grpc, closed_loop, poisson;
static int connections, streams_each, epoll_fd, timer_fd;
static double rate, end, next_arrival;
static uint8_t *body;
static size_t body_size;
static uint8_t first_head[1024], later_head[16];
static size_t first_head_size, later_head_size;
static Connection *all;
static double *latencies, *waiting;      // waiting: starts of requests that found no client free
static size_t answered, in_time, capacity, failed, outstanding, wait_at, waits, wait_capacity;
static Stream **idle;
static Connection **idle_connection;
static size_t idle_at, idles;
static FILE *answer_file;
static char reason[200] = "";

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void put32(uint8_t *p, uint32_t v) {
    p[0] = (uint8_t)(v >> 24), p[1] = (uint8_t)(v >> 16), p[2] = (uint8_t)(v >> 8), p[3] = (uint8_t)v;
}

static uint32_t get32(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void frame_head(uint8_t *p, size_t size, int type, int flags, uint32_t id) {
    put32(p, (uint32_t)size << 8 | (uint32_t)type);
    p[4] = (uint8_t)flags;
    put32(p + 5, id);
}

static void control(Connection *c, int type, int flags, uint32_t id, const void *payload, size_t size) {
    if (c->controls + FRAME_HEAD + size > CONTROL) die("the server asks for more than it reads");
    frame_head(c->control + c->controls, size, type, flags, id);
    memcpy(c->control + c->controls + FRAME_HEAD, payload, size);
    c->controls += FRAME_HEAD + size;
}

static void queue(Connection *c, void *data, size_t size) {
    c->iov[c->iovs++] = (struct iovec){data, size};
}

// Put what may be sent now into the connection's empty list of iovecs.
static void fill(Connection *c) {
    c->iovs = c->iov_at = 0;
    if (c->controls) {
        memcpy(c->sending, c->control, c->controls);
        queue(c, c->sending, c->controls);
        c->controls = 0;
    }
    for (int i = 0; i < streams_each; i++) {
        Stream *s = &c->streams[i];
        if (!s->busy || s->sent == body_size || c->iovs + 4 > MAX_IOV) continue;
        if (!is_grpc) {
            queue(c, first_head, first_head_size);
            queue(c, body, body_size);
            s->sent = body_size;
            continue;
        }
        if (!s->headed) {
            size_t size = c->introduced ? later_head_size : first_head_size;
            s->id = c->next_id, c->next_id += 2; // here and not in start: HTTP/2 wants them in rising order on the wire
            frame_head(c->heads[c->iovs], size, HEADERS, END_HEADERS, s->id);
            queue(c, c->heads[c->iovs], FRAME_HEAD);
            queue(c, c->introduced ? later_head : first_head, size);
            c->introduced = s->headed = true;
        }
        while (s->sent < body_size && s->window > 0 && c->window > 0 && c->iovs + 2 <= MAX_IOV) {
            size_t size = body_size - s->sent;
            if (size > c->max_frame) size = c->max_frame;
            if ((int64_t)size > s->window) size = (size_t)s->window;
            if ((int64_t)size > c->window) size = (size_t)c->window;
            bool last = s->sent + size == body_size;
            frame_head(c->heads[c->iovs], size, DATA, last ? END_STREAM : 0, s->id);
            queue(c, c->heads[c->iovs], FRAME_HEAD);
            queue(c, body + s->sent, size);
            s->sent += size, s->window -= (int64_t)size, c->window -= (int64_t)size;
        }
    }
}

static void flush(Connection *c) {
    for (;;) {
        if (c->iov_at == c->iovs) fill(c);
        if (c->iovs == 0) return;
        struct msghdr message = {.msg_iov = c->iov + c->iov_at, .msg_iovlen = (size_t)(c->iovs - c->iov_at)};
        ssize_t n = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) return;
        if (n < 0) die("the server closed a connection: %s", strerror(errno));
        for (; n > 0 && (size_t)n >= c->iov[c->iov_at].iov_len; c->iov_at++) n -= (ssize_t)c->iov[c->iov_at].iov_len;
        if (n > 0) {
            c->iov[c->iov_at].iov_base = (uint8_t *)c->iov[c->iov_at].iov_base + n;
            c->iov[c->iov_at].iov_len -= (size_t)n;
        }
    }
}

static void start(Connection *c, Stream *s, double when) {
    *s = (Stream){.busy = true, .window = c->initial_window, .start = when};
    outstanding++;
}

static void complete(Connection *c, Stream *s, bool ok) {
    double t = now();
    outstanding--;
    s->busy = false;
    if (!ok) failed++;
    else {
        if (answered == capacity) {
            capacity = capacity ? 2 * capacity : 1 << 16;
            if (!(latencies = realloc(latencies, capacity * sizeof *latencies))) die("out of memory");
        }
        in_time += t <= end;
        latencies[answered++] = t - s->start;
    }
    if (answer_file && s == all[0].streams) fclose(answer_file), answer_file = NULL;
    if (closed_loop) {
        if (t < end) start(c, s, t);
    } else if (waits) {
        start(c, s, waiting[wait_at]);
        wait_at = (wait_at + 1) % wait_capacity, waits--;
    } else {
        size_t at = (idle_at + idles++) % (size_t)(connections * streams_each);
        idle[at] = s, idle_connection[at] = c;
    }
}

static void answer(Stream *s, const uint8_t *data, size_t size) {
    s->received += size;
    if (answer_file && s == all[0].streams) fwrite(data, 1, size, answer_file);
}

static void blame(const char *what, const uint8_t *text, size_t size) {
    if (reason[0]) return;
    size_t at = (size_t)snprintf(reason, sizeof reason, "%s", what);
    for (size_t i = 0; i < size && at + 1 < sizeof reason; i++)
        if (text[i] >= ' ' && text[i] < 127 && text[i] != '"' && text[i] != '\\') reason[at++] = (char)text[i];
    reason[at] = 0;
}

static bool trailers_ok(const uint8_t *p, size_t size) {
    const uint8_t *found = memmem(p, size, "grpc-status", 11);
    if (found && found + 13 <= p + size && found[11] == 1 && found[12] == '0') return true;
    blame("trailers: ", p, size);
    return false;
}

static Stream *stream(Connection *c, uint32_t id) {
    for (int i = 0; i < streams_each; i++)
        if (c->streams[i].busy && c->streams[i].id == id) return &c->streams[i];
    return NULL;
}

static void settings(Connection *c, const uint8_t *p, size_t size) {
    for (; size >= 6; p += 6, size -= 6) {
        uint32_t value = get32(p + 2);
        int name = p[0] << 8 | p[1];
        if (name == 1 && value < 4096) die("the server's header table is too small");
        if (name == 5) c->max_frame = value;
        if (name == 4) {
            for (int i = 0; i < streams_each; i++) c->streams[i].window += (int64_t)value - c->initial_window;
            c->initial_window = value;
        }
    }
    control(c, SETTINGS, ACK, 0, NULL, 0);
}

static void frame(Connection *c, int type, int flags, uint32_t id, const uint8_t *p, size_t size) {
    Stream *s = id ? stream(c, id) : NULL;
    if (type == SETTINGS && !(flags & ACK)) settings(c, p, size);
    else if (type == PING && !(flags & ACK)) control(c, PING, ACK, 0, p, size);
    else if (type == GOAWAY) die("the server says GOAWAY, code %u", get32(p + 4));
    else if (type == WINDOW_UPDATE && s) s->window += get32(p);
    else if (type == WINDOW_UPDATE && !id) c->window += get32(p);
    else if (type == RST_STREAM && s) blame("RST_STREAM", NULL, 0), complete(c, s, false);
    else if (type == DATA) {
        c->unacknowledged += size;
        if (c->unacknowledged > WINDOW / 4) {
            uint8_t increment[4];
            put32(increment, (uint32_t)c->unacknowledged);
            control(c, WINDOW_UPDATE, 0, 0, increment, 4);
            c->unacknowledged = 0;
        }
        if (s) answer(s, p, size);
    } else if (type == HEADERS && s && flags & END_STREAM) complete(c, s, trailers_ok(p, size) && s->received > 5);
}

static void read_grpc(Connection *c) {
    size_t at = 0;
    while (c->ins - at >= FRAME_HEAD) {
        const uint8_t *p = c->in + at;
        size_t size = get32(p) >> 8;
        if (size > RECEIVE - FRAME_HEAD) die("a frame of %zu bytes", size);
        if (c->ins - at < FRAME_HEAD + size) break;
        frame(c, p[3], p[4], get32(p + 5) & WINDOW, p + FRAME_HEAD, size);
        at += FRAME_HEAD + size;
    }
    memmove(c->in, c->in + at, c->ins -= at);
}

static void read_http(Connection *c) {
    size_t at = 0;
    Stream *s = c->streams;
    while (at < c->ins) {
        if (!c->http_body) {
            uint8_t *p = c->in + at, *stop = memmem(p, c->ins - at, "\r\n\r\n", 4);
            if (!stop) break;
            *stop = 0;
            char *length = strcasestr((char *)p, "\r\ncontent-length:");
            if (!length) die("an answer without Content-Length: %.200s", p);
            c->http_left = strtoull(length + 17, NULL, 10);
            c->http_ok = c->ins - at > 12 && memcmp(p + 9, "200", 3) == 0;
            c->http_body = true;
            at = (size_t)(stop + 4 - c->in);
            if (!c->http_ok) blame("", p, strcspn((char *)p, "\r"));
        }
        size_t size = c->ins - at < c->http_left ? c->ins - at : c->http_left;
        if (c->http_ok) answer(s, c->in + at, size);
        else blame("", c->in + at, size);
        at += size, c->http_left -= size;
        if (c->http_left) break;
        c->http_body = false;
        complete(c, s, c->http_ok);
    }
    memmove(c->in, c->in + at, c->ins -= at);
}

static void receive(Connection *c) {
    for (bool more = true; more;) {
        size_t room = RECEIVE - c->ins;
        ssize_t n = recv(c->fd, c->in + c->ins, room, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) die("the server closed a connection%s%s", reason[0] ? " after: " : "", reason);
        c->ins += (size_t)n;
        more = (size_t)n == room;
        is_grpc ? read_grpc(c) : read_http(c);
    }
}

static void arm(double when) {
    struct itimerspec t = {.it_value = {(time_t)when, (long)(fmod(when, 1) * 1e9)}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &t, NULL);
}

// Start what is due, and set the timer for the next.
static void arrivals(void) {
    double t = now();
    while (next_arrival <= t && next_arrival < end) {
        if (idles) {
            Connection *c = idle_connection[idle_at];
            start(c, idle[idle_at], next_arrival);
            idle_at = (idle_at + 1) % (size_t)(connections * streams_each), idles--;
            flush(c);
        } else {
            if (waits == wait_capacity) die("more than %zu requests wait for a client", waits);
            waiting[(wait_at + waits++) % wait_capacity] = next_arrival;
        }
        next_arrival += (poisson ? -log(1 - drand48()) : 1) / rate;
    }
    arm(next_arrival < end ? next_arrival : end + DRAIN_SECONDS);
}

static size_t literal(uint8_t *p, uint8_t index, const char *name, const char *value) {
    size_t at = 0;
    p[at++] = 0x40 | index; // incremental indexing
    if (!index) p[at++] = (uint8_t)strlen(name), memcpy(p + at, name, strlen(name)), at += strlen(name);
    p[at++] = (uint8_t)strlen(value), memcpy(p + at, value, strlen(value));
    return at + strlen(value);
}

static void prepare(const char *host, const char *port, const char *path, const char *content_type) {
    char authority[64];
    snprintf(authority, sizeof authority, "%s:%s", host, port);
    if (strlen(path) > 120 || strlen(content_type) > 100) die("the path or the content type is too long");
    if (!is_grpc) {
        const char *head = "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n";
        first_head_size = (size_t)snprintf((char *)first_head, sizeof first_head, head, path, authority, content_type,
                                           body_size);
        return;
    }
    uint8_t *p = first_head;
    *p++ = 0x83, *p++ = 0x86; // :method POST, :scheme http (RFC 7541, appendix A)
    p += literal(p, 4, ":path", path);
    p += literal(p, 1, ":authority", authority);
    p += literal(p, 31, "content-type", content_type);
    p += literal(p, 0, "te", "trailers");
    first_head_size = (size_t)(p - first_head);
    memcpy(later_head, "\x83\x86\xc1\xc0\xbf\xbe", 6); // and entries 65 to 62 of the table that these made
    later_head_size = 6;
}

static void read_body(const char *name) {
    FILE *file = fopen(name, "rb");
    if (!file) die("%s: %s", name, strerror(errno));
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file), prefix = is_grpc ? 5 : 0;
    rewind(file);
    if (!(body = malloc(size + prefix))) die("out of memory");
    body[0] = 0;
    if (is_grpc) put32(body + 1, (uint32_t)size);
    if (fread(body + prefix, 1, size, file) != size) die("%s: cannot be read", name);
    fclose(file);
    body_size = size + prefix;
}

static void open_connection(Connection *c, const char *host, const char *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) die("%s is not an IPv4 address", host);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) die("%s:%s: %s", host, port, strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->next_id = 1;
    c->window = c->initial_window = 65535;
    c->max_frame = 16384;
    c->streams = calloc((size_t)streams_each, sizeof *c->streams);
    if (is_grpc) {
        static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        memcpy(c->control, preface, c->controls = sizeof preface - 1);
        uint8_t ours[18] = {0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 4}, increment[4]; // no table, no push, windows
        put32(ours + 14, WINDOW);
        control(c, SETTINGS, 0, 0, ours, sizeof ours);
        put32(increment, WINDOW - 65535);
        control(c, WINDOW_UPDATE, 0, 0, increment, 4);
    }
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
}

static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static void run(double seconds) {
    double cpu = cpu_seconds();
    double begin = next_arrival = now();
    end = begin + seconds;
    for (int i = 0; i < streams_each; i++)
        for (int j = 0; j < connections; j++) {
            if (closed_loop) start(&all[j], &all[j].streams[i], begin);
            else idle[idles] = &all[j].streams[i], idle_connection[idles++] = &all[j];
        }
    for (int j = 0; j < connections; j++) flush(&all[j]);
    closed_loop ? arm(end + DRAIN_SECONDS) : arrivals();
    while (outstanding || (!closed_loop && next_arrival < end)) {
        struct epoll_event events[64];
        int n = epoll_wait(epoll_fd, events, 64, -1);
        for (int i = 0; i < n; i++) {
            Connection *c = events[i].data.ptr;
            if (c) {
                if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) receive(c);
                flush(c);
            } else if (now() >= end + DRAIN_SECONDS) die("%zu requests without an answer", outstanding + waits);
            else arrivals();
        }
    }
    printf("{\"answered\": %zu, \"failed\": %zu, \"rps\": %.3f, \"client_cpu_ms\": %.6f, \"reason\": \"%s\"}\n",
           answered, failed, (double)in_time / seconds, 1e3 * (cpu_seconds() - cpu) / (double)(answered + failed),
           reason);
}

int main(int count, char **argument) {
    if (count != 15) die("usage: load HOST PORT grpc|http PATH CONTENT_TYPE BODY CONNECTIONS STREAMS SECONDS RATE "
                         "fixed|poisson SEED LATENCIES ANSWER");
    is_grpc = strcmp(argument[3], "grpc") == 0;
    connections = atoi(argument[7]), streams_each = is_grpc ? atoi(argument[8]) : 1;
    double seconds = atof(argument[9]);
    rate = atof(argument[10]), closed_loop = rate <= 0, poisson = strcmp(argument[11], "poisson") == 0;
    srand48(atol(argument[12]));
    if (connections < 1 || streams_each < 1 || seconds <= 0) die("CONNECTIONS, STREAMS and SECONDS must be positive");
    read_body(argument[6]);
    prepare(argument[1], argument[2], argument[4], argument[5]);
    prctl(PR_SET_TIMERSLACK, 1UL); // the default, 50 microseconds, would start every request late
    epoll_fd = epoll_create1(0), timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &(struct epoll_event){.events = EPOLLIN | EPOLLET});
    all = calloc((size_t)connections, sizeof *all);
    idle = calloc((size_t)(connections * streams_each), sizeof *idle);
    idle_connection = calloc((size_t)(connections * streams_each), sizeof *idle_connection);
    wait_capacity = (size_t)(rate * seconds * 2) + 1024;
    waiting = calloc(wait_capacity, sizeof *waiting);
    if (!(answer_file = fopen(argument[14], "wb"))) die("%s: %s", argument[14], strerror(errno));
    for (int i = 0; i < connections; i++) open_connection(&all[i], argument[1], argument[2]);
    run(seconds);
    FILE *file = fopen(argument[13], "wb");
    if (!file || fwrite(latencies, sizeof *latencies, answered, file) != answered || fclose(file))
        die("%s: cannot be written", argument[13]);
    return 0;
}
