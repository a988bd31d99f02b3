// glibc 2.32 and newer say by this variable whether a process has had one thread only, for which libstdc++ counts references without
// atomics. One of our own, hidden, that never says so: builds for older glibc lack it otherwise, see link_command in setup.py.
extern "C" {
extern char __libc_single_threaded;
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
