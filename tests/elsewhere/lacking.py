"""What Python has on POSIX alone, by module; in no code of the package but where something else is done without it."""

LACKING = {
    "os": """fork forkpty register_at_fork pread preadv pwrite pwritev posix_fallocate sendfile copy_file_range geteuid
        getuid getegid getgid killpg getpgid setsid setgroups setresgid setresuid wait3 wait4 waitid sched_getaffinity
        uname getloadavg statvfs fchown fchmod chown lchown mkfifo mknod sysconf pidfd_open memfd_create O_NOFOLLOW
        O_DIRECT O_NONBLOCK O_CLOEXEC O_NOCTTY O_DIRECTORY O_SYNC O_DSYNC EX_OK EX_IOERR EX_USAGE""",
    "signal": """SIGKILL SIGXCPU SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGPIPE SIGQUIT alarm setitimer pthread_sigmask
        pthread_kill sigwait sigpending SIG_BLOCK SIG_UNBLOCK SIG_SETMASK""",
    "mmap": "MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS MAP_ANON MAP_POPULATE PROT_READ PROT_WRITE",
    "select": "poll epoll POLLIN",
}
MISSING = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix")
