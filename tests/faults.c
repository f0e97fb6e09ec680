/* Hits calls of this process that change the disk: fails the n-th, cuts it short, or stops the process before each.
 *
 * Loaded by LD_PRELOAD, it stands between a program and the C library. Nothing is hit before it is armed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

enum { STOP = -1, SHORT = -2 }; /* faults; any other is the errno that the call fails with */

static long *calls; /* counted so far, in memory that the parent sees; NULL: not armed */
static long hit_at;
static int hit_with;

void arm(long *counter, long at, int fault) {
    hit_at = at;
    hit_with = fault;
    calls = counter;
}

/* Returns 0 where the call is to be made, 1 where half of it is, and -1, with errno set, where it fails. */
static int hit(int is_write) {
    if (!calls || (hit_with == SHORT && !is_write)) return 0;
    long number = __sync_add_and_fetch(calls, 1);
    if (hit_with == STOP) raise(SIGSTOP);
    if (number != hit_at) return 0;
    if (hit_with == SHORT) return 1;
    errno = hit_with;
    return -1;
}

static int is_file(int descriptor) { /* not of a pipe or a terminal, nor of what was printed */
    struct stat status;
    return descriptor > 2 && !fstat(descriptor, &status) && S_ISREG(status.st_mode);
}

static int is_change(const char *path, int flags) {
    return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) && strncmp(path, "/dev/", 5) && strncmp(path, "/proc/", 6);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags, mode)                 \
    mode_t mode = 0;                      \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest;                     \
        va_start(rest, flags);            \
        mode = va_arg(rest, mode_t);      \
        va_end(rest);                     \
    }

#define OPEN(name)                                    \
    int name(const char *path, int flags, ...) {      \
        MODE(flags, mode)                             \
        if (is_change(path, flags) && hit(0)) return -1; \
        return REAL(name)(path, flags, mode);         \
    }
#define OPENAT(name)                                         \
    int name(int folder, const char *path, int flags, ...) { \
        MODE(flags, mode)                                    \
        if (is_change(path, flags) && hit(0)) return -1;     \
        return REAL(name)(folder, path, flags, mode);        \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* A write of one byte can't be cut short. */
#define CUT(file, length)                      \
    int cut = is_file(file) ? hit(length > 1) : 0; \
    if (cut < 0) return -1;                    \
    if (cut) length /= 2;

ssize_t write(int file, const void *bytes, size_t length) {
    CUT(file, length)
    return REAL(write)(file, bytes, length);
}
ssize_t pwrite(int file, const void *bytes, size_t length, off_t position) {
    CUT(file, length)
    return REAL(pwrite)(file, bytes, length, position);
}
ssize_t pwrite64(int file, const void *bytes, size_t length, off64_t position) {
    CUT(file, length)
    return REAL(pwrite64)(file, bytes, length, position);
}
ssize_t sendfile(int file, int source, off_t *position, size_t length) {
    CUT(file, length)
    return REAL(sendfile)(file, source, position, length);
}
ssize_t sendfile64(int file, int source, off64_t *position, size_t length) {
    CUT(file, length)
    return REAL(sendfile64)(file, source, position, length);
}
ssize_t copy_file_range(int source, off64_t *from, int file, off64_t *to, size_t length, unsigned flags) {
    CUT(file, length)
    return REAL(copy_file_range)(source, from, file, to, length, flags);
}

#define CHANGE(name, declared, given)  \
    int name declared {                \
        if (hit(0)) return -1;         \
        return REAL(name) given;       \
    }
CHANGE(ftruncate, (int file, off_t length), (file, length))
CHANGE(ftruncate64, (int file, off64_t length), (file, length))
CHANGE(fallocate, (int file, int mode, off_t begin, off_t length), (file, mode, begin, length))
CHANGE(fallocate64, (int file, int mode, off64_t begin, off64_t length), (file, mode, begin, length))
CHANGE(fsync, (int file), (file))
CHANGE(mkdir, (const char *path, mode_t mode), (path, mode))
CHANGE(rmdir, (const char *path), (path))
CHANGE(unlink, (const char *path), (path))
CHANGE(unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
CHANGE(link, (const char *from, const char *to), (from, to))
CHANGE(linkat, (int f, const char *from, int t, const char *to, int flags), (f, from, t, to, flags))
CHANGE(symlink, (const char *from, const char *to), (from, to))
CHANGE(rename, (const char *from, const char *to), (from, to))
CHANGE(renameat, (int f, const char *from, int t, const char *to), (f, from, t, to))
CHANGE(renameat2, (int f, const char *from, int t, const char *to, unsigned flags), (f, from, t, to, flags))
