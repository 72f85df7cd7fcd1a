/* A wall clock that is wrong for every program of a host, by preloading this library (/etc/ld.so.preload).
 *
 *     cc -shared -fPIC -O2 -o clock.so clock.c
 *
 * The kernel keeps one wall clock for all its namespaces. The offset, nanoseconds as an int64, is mapped from SKEW, so a
 * running program sees a new one at once. Monotonic clocks stay true, and so do waits that end at a time of the wall clock.
 * (Debian's libfaketime breaks Python 3.11's time.sleep when it leaves the monotonic clock alone, hence our own.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define SKEW "/etc/sparklab/skew"
#define SECOND 1000000000LL
#define LONG_AGO 1000000000LL /* s: a deadline past it is the wall clock's, no machine has been up for 31 years */
#define NEVER 100000000000LL  /* s: and one past this is no deadline at all (systemd asks for TIME_T_MAX) */

static const int64_t *skew;

__attribute__((constructor)) static void open_skew(void) {
    int file = open(SKEW, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    void *mapped = mmap(NULL, sizeof *skew, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped != MAP_FAILED)
        skew = mapped;
}

static struct timespec moved(struct timespec at, int64_t by) {
    int64_t sum = at.tv_sec * SECOND + at.tv_nsec + by;
    return (struct timespec){.tv_sec = sum / SECOND, .tv_nsec = sum % SECOND};
}

/* A deadline by the wrong clock, as the kernel must see it. */
static struct timespec true_time(const struct timespec *at) {
    return skew && at->tv_sec > LONG_AGO && at->tv_sec < NEVER ? moved(*at, -*skew) : *at;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && skew && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        *now = moved(*now, *skew);
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &fine) == 0)
        *now = (struct timeval){.tv_sec = fine.tv_sec, .tv_usec = fine.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *kept) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (kept)
        *kept = now.tv_sec;
    return now.tv_sec;
}

int timespec_get(struct timespec *now, int base) {
    return base == TIME_UTC && clock_gettime(CLOCK_REALTIME, now) == 0 ? base : 0;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    static int (*real)(clockid_t, int, const struct timespec *, struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "clock_nanosleep");
    struct timespec at = flags & TIMER_ABSTIME ? true_time(until) : *until;
    return real(clock, flags, &at, left);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static int (*real)(sem_t *, const struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec at = true_time(until);
    return real(semaphore, &at);
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!real) /* x86-64 has an older one of the same name */
        real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real)
        real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec at = true_time(until);
    return real(cond, mutex, &at);
}

int timerfd_settime(int timer, int flags, const struct itimerspec *new, struct itimerspec *old) {
    static int (*real)(int, int, const struct itimerspec *, struct itimerspec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "timerfd_settime");
    struct itimerspec at = *new;
    if (flags & TFD_TIMER_ABSTIME)
        at.it_value = true_time(&new->it_value);
    return real(timer, flags, &at, old);
}
