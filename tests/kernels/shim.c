/* shim.c: a parallel-for over plain threads, for the kernel tests: shim_threads(n) sets how many. */
#include <pthread.h>
#include <stdint.h>

#include "kernels.h"

static int threads = 2;

void shim_threads(int n) {
    threads = n;
}

typedef struct {
    int64_t begin, end;
    pk_range_fn fn;
    void *ctx;
} piece;

static void *run_piece(void *arg) {
    const piece *const p = arg;
    p->fn(p->begin, p->end, p->ctx);
    return NULL;
}

int32_t shim_parallel(int64_t begin, int64_t end, int64_t grain, pk_range_fn fn, void *ctx) {
    pthread_t ids[16];
    piece pieces[16];
    const int64_t n = end - begin;
    int64_t parts = grain > 0 ? (n + grain - 1) / grain : n;
    if (parts > threads) parts = threads;
    if (parts > 16) parts = 16;
    for (int64_t i = 0; i < parts; i++) {
        pieces[i] = (piece){begin + n * i / parts, begin + n * (i + 1) / parts, fn, ctx};
        if (pthread_create(&ids[i], NULL, run_piece, &pieces[i]) != 0) return 1;
    }
    for (int64_t i = 0; i < parts; i++) pthread_join(ids[i], NULL);
    return 0;
}
