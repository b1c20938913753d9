/* Clients that cost next to nothing: one request again and again, over kept connections, on one thread.
 *
 * load PORT REQUEST_FILE END CONNECTIONS SECONDS RATE GRACE
 *
 * RATE 0: each connection asks again as soon as it has its answer. Else so many requests a second, each due at a moment
 * of its own; its times count from that moment, also where no connection was free. An answer counts if its status is
 * 200 and END stands in its last bytes. After SECONDS nothing more is asked; what is under way has GRACE seconds.
 * It ends with one line of JSON; `answers` are those within SECONDS, `late` those after. */
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
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MOST 4096
#define MOST_HEAD 8192
#define TAIL 512

enum state { CLOSED, IDLE, HEAD, SIZE, DATA, DATA_END, TRAILER };

struct client {
    int fd, is_reused, is_chunked, keeps, status;
    enum state state;
    double asked_s, first_s;
    char head[MOST_HEAD + 1], tail[TAIL + 1];
    size_t head_length, tail_length;
    long left; /* bytes of this chunk, or of the body; -1: until the end of the connection */
    long line; /* what stands in the line of a chunk's size so far */
};

struct times { double *all; size_t count, capacity; };

static struct client clients[MOST];
static int idle[MOST], idle_count, epoll, under_way;
static char request[65536];
static size_t request_length;
static struct sockaddr_in address = {.sin_family = AF_INET};
static const char *expected;
static double ends_s;
static long answers, late, refused, wrong, broken, chunks, bytes, again_at_once;
static struct times first_times, whole_times;

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void add(struct times *times, double seconds) {
    if (times->count == times->capacity) {
        times->capacity = times->capacity ? times->capacity * 2 : 4096;
        times->all = realloc(times->all, times->capacity * sizeof(double));
        if (!times->all) exit(1);
    }
    times->all[times->count++] = seconds;
}

static int compare(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static void print_times(const char *name, struct times *times) {
    qsort(times->all, times->count, sizeof(double), compare);
    double p50 = times->count ? times->all[times->count / 2] : 0, p99 = times->count ? times->all[times->count * 99 / 100] : 0;
    printf("\"%s_ms\":{\"p50\":%.4f,\"p99\":%.4f},", name, p50 * 1e3, p99 * 1e3);
}

static void hang_up(struct client *c) {
    close(c->fd);
    c->state = CLOSED;
}

static int dial(struct client *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address)) return 0;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
    c->is_reused = 0;
    return 1;
}

/* On loopback a request of this size goes out at once, so nothing here waits to write. */
static void ask(struct client *c, double asked_s) {
    c->asked_s = asked_s;
    c->first_s = 0;
    c->head_length = c->tail_length = 0;
    under_way++;
    if (c->state == CLOSED && !dial(c)) {
        broken++;
        under_way--;
        if (c->fd >= 0) close(c->fd);
        idle[idle_count++] = (int)(c - clients);
        return;
    }
    c->state = HEAD;
    /* Where it fails, the end of the connection is told next. */
    (void)!send(c->fd, request, request_length, MSG_NOSIGNAL);
}

static void over(struct client *c, int is_whole) {
    double now = now_s();
    under_way--;
    if (!is_whole) broken++;
    else if (c->status != 200) refused++;
    else if (c->tail[c->tail_length] = 0, !memmem(c->tail, c->tail_length, expected, strlen(expected))) wrong++;
    else {
        if (now <= ends_s) answers++;
        else late++;
        add(&first_times, c->first_s - c->asked_s);
        add(&whole_times, now - c->asked_s);
    }
    if (!is_whole || !c->keeps) hang_up(c);
    else c->state = IDLE;
    c->is_reused = 1;
    if (again_at_once && now < ends_s && is_whole) ask(c, now);
    else idle[idle_count++] = (int)(c - clients);
}

/* The connection was closed from the other side. A kept one may close as we ask: that is asked once more. */
static void ended(struct client *c) {
    int never_began = c->is_reused && c->state == HEAD && !c->head_length;
    double asked_s = c->asked_s;
    if (c->state == IDLE) hang_up(c);
    else if (never_began) {
        hang_up(c);
        under_way--;
        ask(c, asked_s);
    } else over(c, c->state == DATA && c->left < 0);
}

static void keep_tail(struct client *c, const char *data, size_t length) {
    bytes += (long)length;
    if (!c->first_s) c->first_s = now_s();
    if (length >= TAIL) data += length - TAIL, length = TAIL;
    size_t over_by = c->tail_length + length > TAIL ? c->tail_length + length - TAIL : 0;
    memmove(c->tail, c->tail + over_by, c->tail_length - over_by);
    c->tail_length -= over_by;
    memcpy(c->tail + c->tail_length, data, length);
    c->tail_length += length;
}

/* Takes what belongs to the head; says how many bytes that was. */
static size_t take_head(struct client *c, const char *data, size_t length) {
    size_t taken = length < MOST_HEAD - c->head_length ? length : MOST_HEAD - c->head_length;
    memcpy(c->head + c->head_length, data, taken);
    size_t before = c->head_length;
    c->head_length += taken;
    c->head[c->head_length] = 0;
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end) return length;
    end[2] = 0;
    char *size = strcasestr(c->head, "\r\ncontent-length:");
    c->status = atoi(c->head + 9);
    c->is_chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked") != NULL;
    c->keeps = !strcasestr(c->head, "\r\nconnection: close") && (c->is_chunked || size);
    c->left = c->is_chunked ? 0 : size ? atol(size + 17) : -1;
    c->line = 0;
    c->state = c->is_chunked ? SIZE : DATA;
    return (size_t)(end + 4 - c->head) - before;
}

static void take_size(struct client *c, char sign) {
    if (sign != '\n') {
        /* A digit of the size, in either case; a carriage return is none. */
        if (sign != '\r') c->line = c->line * 16 + (sign <= '9' ? sign - '0' : (sign | 32) - 'a' + 10);
        return;
    }
    c->left = c->line;
    c->line = 0;
    chunks += c->left > 0;
    c->state = c->left ? DATA : TRAILER;
}

static void receive(struct client *c) {
    static char data[65536];
    if (c->state == CLOSED) return; /* told with others, and closed meanwhile */
    ssize_t got = recv(c->fd, data, sizeof data, MSG_DONTWAIT);
    if (got <= 0) {
        if (got == 0 || errno != EAGAIN) ended(c);
        return;
    }
    for (size_t at = 0; at < (size_t)got;) {
        size_t rest = (size_t)got - at;
        if (c->state == HEAD) at += take_head(c, data + at, rest);
        else if (c->state == DATA) {
            size_t part = c->left >= 0 && (size_t)c->left < rest ? (size_t)c->left : rest;
            keep_tail(c, data + at, part);
            at += part;
            if (c->left > 0 && !(c->left -= (long)part) && c->is_chunked) c->state = DATA_END;
        } else if (c->state == SIZE) take_size(c, data[at++]);
        else if (c->state == DATA_END) c->state = data[at++] == '\n' ? SIZE : DATA_END;
        else if (c->state == TRAILER) {
            if (data[at++] != '\n') continue;
            over(c, 1);
            return;
        } else return;
        if (c->state == DATA && !c->is_chunked && !c->left) {
            over(c, 1);
            return;
        }
    }
}

/* The next moment at which something is to be done, if nothing is heard before. */
static double ask_due(double starts_s, double rate, double grace) {
    static long asked;
    double now = now_s(), due = now;
    while (now < ends_s && idle_count && (!rate || (due = starts_s + (double)asked / rate) <= now)) {
        asked++;
        ask(&clients[idle[--idle_count]], due);
    }
    return now >= ends_s ? ends_s + grace : rate && idle_count && due < ends_s ? due : ends_s;
}

static double run(double seconds, double rate, double grace) {
    double starts_s = now_s(), set_s = 0, next_s;
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[256];
    epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &event);
    ends_s = starts_s + seconds;
    again_at_once = rate == 0;
    while ((next_s = ask_due(starts_s, rate, grace)), now_s() < ends_s || (under_way && now_s() < next_s)) {
        if (broken > 1000) break;
        if (next_s != set_s) {
            struct itimerspec at = {.it_value = {(time_t)next_s, (long)((next_s - (double)(time_t)next_s) * 1e9) + 1}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
            set_s = next_s;
        }
        int count = epoll_wait(epoll, events, 256, -1);
        for (int i = 0; i < count; i++) {
            uint64_t times;
            if (events[i].data.ptr) receive(events[i].data.ptr);
            else if (read(timer, &times, sizeof times) > 0) set_s = 0;
        }
    }
    return now_s() - starts_s;
}

int main(int count, char **words) {
    if (count != 8) return 2;
    FILE *file = fopen(words[2], "rb");
    if (!file) return 2;
    request_length = fread(request, 1, sizeof request, file);
    fclose(file);
    address.sin_port = htons((uint16_t)atoi(words[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    expected = words[3];
    int connections = atoi(words[4]);
    if (connections < 1 || connections > MOST) return 2;
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(0);
    for (int i = 0; i < connections; i++) idle[idle_count++] = connections - 1 - i;
    double seconds = run(atof(words[5]), atof(words[6]), atof(words[7]));
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"seconds\":%.4f,\"answers\":%ld,\"late\":%ld,\"refused\":%ld,\"wrong\":%ld,\"broken\":%ld,\"unfinished\":%d,\"chunks\":%ld,\"bytes\":%ld,",
           seconds, answers, late, refused, wrong, broken, under_way, chunks, bytes);
    print_times("first", &first_times);
    print_times("whole", &whole_times);
    printf("\"cpu_seconds\":%.3f}\n", (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                                          (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
    return 0;
}
