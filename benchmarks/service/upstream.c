/* An upstream that costs next to nothing: OpenAI's chat completions on one thread, with keep-alive.
 *
 * It listens on a free port of 127.0.0.1, prints the port, and serves until its standard input ends. The text of the
 * prompt says what it answers: "tokens=20" (default 20, never more than max_tokens) and "pace_us=20000" (one event a
 * write, so far apart; default 0: all events in one write). GET /stats tells what was generated since the start. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST_FDS 4096
#define MOST_REQUEST 65536
#define INPUT_TOKENS 16
#define CHUNK "{\"id\":\"chatcmpl-0123456789abcdefghijklmnopqrst\",\"object\":\"chat.completion.chunk\"," \
              "\"created\":1760000000,\"model\":\"gpt-4o\",\"system_fingerprint\":\"fp_0123456789\","
#define CHOICE "\"choices\":[{\"index\":0,\"delta\":%s,\"logprobs\":null,\"finish_reason\":%s}]"

struct connection {
    char in[MOST_REQUEST + 1];
    size_t in_length;
    char *out;
    size_t out_length, out_sent, out_capacity;
    int left, all, wants_usage, was_cut;
    long pace_us;
    int64_t due_us; /* of the next event; 0: none is due */
};

static struct connection *connections[MOST_FDS];
static int paced[MOST_FDS], paced_count;
static char is_paced[MOST_FDS]; /* a number may be given out again before `send_due` has seen its end */
static int epoll;
static struct { long requests, streamed, input_tokens, output_tokens, open, hung_up; } stats;

static int64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static void put(struct connection *c, const char *text, size_t length) {
    while (c->out_length + length > c->out_capacity) {
        c->out_capacity = c->out_capacity ? c->out_capacity * 2 : 16384;
        c->out = realloc(c->out, c->out_capacity);
        if (!c->out) exit(1);
    }
    memcpy(c->out + c->out_length, text, length);
    c->out_length += length;
}

static void put_text(struct connection *c, const char *text) { put(c, text, strlen(text)); }

static void put_event(struct connection *c, const char *data) {
    char head[32];
    size_t length = strlen(data) + 8; /* "data: " and the empty line */
    put(c, head, (size_t)snprintf(head, sizeof head, "%zx\r\ndata: ", length));
    put_text(c, data);
    put_text(c, "\n\n\r\n");
}

static void put_usage(char *into, size_t size, int output) {
    snprintf(into, size, "\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"total_tokens\":%d}", INPUT_TOKENS,
             output, INPUT_TOKENS + output);
}

static void put_token(struct connection *c) {
    static const char first[] = "{\"role\":\"assistant\",\"content\":\" coin\"}", other[] = "{\"content\":\" coin\"}";
    char data[512], usage[128];
    snprintf(data, sizeof data, CHUNK CHOICE "}", c->left == c->all ? first : other, "null");
    put_event(c, data);
    stats.output_tokens++;
    if (--c->left) return;
    snprintf(data, sizeof data, CHUNK CHOICE "}", "{}", c->was_cut ? "\"length\"" : "\"stop\"");
    put_event(c, data);
    if (c->wants_usage) {
        put_usage(usage, sizeof usage, c->all);
        snprintf(data, sizeof data, CHUNK "\"choices\":[],%s}", usage);
        put_event(c, data);
    }
    put_event(c, "[DONE]");
    put_text(c, "0\r\n\r\n");
    stats.open--;
}

static void put_whole(struct connection *c) {
    char usage[128], head[128];
    size_t before = c->out_length, length;
    put_text(c, "{\"id\":\"chatcmpl-0123456789abcdefghijklmnopqrst\",\"object\":\"chat.completion\",\"created\":1760000000,"
                "\"model\":\"gpt-4o\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"");
    for (; c->left; c->left--, stats.output_tokens++) put_text(c, " coin");
    put_text(c, "\",\"refusal\":null},\"logprobs\":null,\"finish_reason\":");
    put_text(c, c->was_cut ? "\"length\"}]," : "\"stop\"}],");
    put_usage(usage, sizeof usage, c->all);
    put_text(c, usage);
    put_text(c, "}");
    length = c->out_length - before;
    int size = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", length);
    put(c, head, (size_t)size); /* makes room; then both change places */
    memmove(c->out + before + size, c->out + before, length);
    memcpy(c->out + before, head, (size_t)size);
}

static void put_stats(struct connection *c) {
    char body[256], head[128];
    int length = snprintf(body, sizeof body,
                          "{\"requests\":%ld,\"streamed\":%ld,\"input_tokens\":%ld,\"output_tokens\":%ld,\"open\":%ld,\"hung_up\":%ld}",
                          stats.requests, stats.streamed, stats.input_tokens, stats.output_tokens, stats.open, stats.hung_up);
    snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", length);
    put_text(c, head);
    put_text(c, body);
}

static long number_after(const char *body, const char *name, long otherwise) {
    const char *found = strstr(body, name);
    if (!found) return otherwise;
    found += strlen(name);
    return strtol(found + strspn(found, " :"), NULL, 10);
}

static int says(const char *body, const char *name) {
    const char *found = strstr(body, name);
    return found && !strncmp(found + strlen(name) + strspn(found + strlen(name), " :"), "true", 4);
}

static void answer(struct connection *c, int fd, const char *body) {
    long most = number_after(body, "\"max_completion_tokens\"", number_after(body, "\"max_tokens\"", 1000000));
    long wanted = number_after(body, "tokens=", 20);
    c->was_cut = most < wanted;
    c->all = c->left = (int)(c->was_cut ? most : wanted);
    c->wants_usage = says(body, "\"include_usage\"");
    c->pace_us = number_after(body, "pace_us=", 0);
    stats.requests++;
    stats.input_tokens += INPUT_TOKENS;
    if (!says(body, "\"stream\"")) {
        put_whole(c);
        return;
    }
    stats.streamed++;
    stats.open++;
    put_text(c, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    if (c->pace_us) {
        c->due_us = now_us() + c->pace_us;
        if (!is_paced[fd]) paced[paced_count++] = fd;
        is_paced[fd] = 1;
    } else {
        while (c->left) put_token(c);
    }
}

static void end(int fd) {
    struct connection *c = connections[fd];
    if (c->left) {
        stats.open--;
        stats.hung_up++;
    }
    connections[fd] = NULL;
    free(c->out);
    free(c);
    close(fd);
}

static void send_out(int fd) {
    struct connection *c = connections[fd];
    while (c->out_sent < c->out_length) {
        ssize_t sent = send(fd, c->out + c->out_sent, c->out_length - c->out_sent, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EAGAIN) break;
            end(fd);
            return;
        }
        c->out_sent += (size_t)sent;
    }
    int is_all = c->out_sent == c->out_length;
    if (is_all) c->out_sent = c->out_length = 0;
    struct epoll_event event = {.events = EPOLLIN | (is_all ? 0 : EPOLLOUT), .data.fd = fd};
    static char waits[MOST_FDS]; /* which of them wait for room, so that epoll is told only of changes */
    if (waits[fd] != !is_all) epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event);
    waits[fd] = !is_all;
}

static void receive(int fd) {
    struct connection *c = connections[fd];
    ssize_t got = recv(fd, c->in + c->in_length, MOST_REQUEST - c->in_length, 0);
    if (got <= 0) {
        if (got == 0 || errno != EAGAIN) end(fd);
        return;
    }
    c->in_length += (size_t)got;
    c->in[c->in_length] = 0;
    char *head_end = strstr(c->in, "\r\n\r\n");
    if (!head_end) return;
    char *length_at = strcasestr(c->in, "\r\ncontent-length:");
    size_t body_length = length_at && length_at < head_end ? strtoul(length_at + 17, NULL, 10) : 0;
    char *body = head_end + 4;
    if (body + body_length > c->in + MOST_REQUEST) end(fd);
    else if (c->in_length >= (size_t)(body - c->in) + body_length) {
        if (!strncmp(c->in, "GET ", 4)) put_stats(c);
        else answer(c, fd, body);
        c->in_length = 0;
        send_out(fd);
    }
}

static void accept_all(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MOST_FDS) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        connections[fd] = calloc(1, sizeof(struct connection));
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
        send_out(fd);
    }
}

/* Sends what is due, and says for how many milliseconds nothing will be. */
static int send_due(void) {
    int64_t now = now_us(), next = now + 1000000;
    for (int i = 0; i < paced_count;) {
        struct connection *c = connections[paced[i]];
        if (c && c->left && c->due_us <= now) {
            put_token(c);
            c->due_us += c->pace_us;
            send_out(paced[i]);
            c = connections[paced[i]];
        }
        if (!c || !c->left) {
            is_paced[paced[i]] = 0;
            paced[i] = paced[--paced_count];
            continue;
        }
        if (c->due_us < next) next = c->due_us;
        i++;
    }
    return next <= now ? 0 : (int)((next - now + 999) / 1000);
}

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    signal(SIGPIPE, SIG_IGN);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) return 1;
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[256];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    event.data.fd = 0;
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    for (;;) {
        int count = epoll_wait(epoll, events, 256, send_due());
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == 0) return 0;
            if (fd == listener) accept_all(listener);
            else {
                if (connections[fd] && events[i].events & EPOLLOUT) send_out(fd);
                if (connections[fd] && events[i].events & ~EPOLLOUT) receive(fd);
            }
        }
    }
}
