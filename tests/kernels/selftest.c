/* selftest.c: every ISA against generic on random shapes, in plain C: for sanitizers, valgrind and emulated CPUs. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "kernels.h"

int32_t shim_parallel(int64_t begin, int64_t end, int64_t grain, pk_range_fn fn, void *ctx);

static uint64_t seed = 88172645463325252u;
static int failures = 0;

static uint64_t next(void) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static int64_t below(int64_t n) {
    return (int64_t)(next() % (uint64_t)n);
}
static double uniform(void) {
    return (double)(next() >> 11) * 0x1p-52 - 1.0;
}

static void expect(int ok, const char *what, int dtype) {
    if (ok) return;
    failures++;
    printf("FAILED: %s, isa %s, dtype %d\n", what, pk_isa_name(), dtype);
}

/* a random matrix, one element of slack so that every overrun is seen by a sanitizer */
static pk_mat make(int64_t rows, int64_t cols, pk_dtype dtype, double size) {
    const int turned = (int)below(2);
    const int64_t step = pk_dtype_size(dtype);
    pk_mat m = {malloc((size_t)(rows * cols * step) + 1), rows, cols, turned ? 1 : cols, turned ? rows : 1, dtype};
    for (int64_t i = 0; i < rows * cols; i++) scalar_store(dtype, (char *)m.data + i * step, size * uniform());
    return m;
}

static size_t bytes(const pk_mat *m) {
    return (size_t)(m->rows * m->cols * pk_dtype_size(m->dtype));
}

static pk_mat copy(const pk_mat *m) {
    pk_mat c = *m;
    c.data = malloc(bytes(m) + 1);
    memcpy(c.data, m->data, bytes(m));
    return c;
}

static pk_mat turned(const pk_mat *m) {
    const pk_mat t = {m->data, m->cols, m->rows, m->cs, m->rs, m->dtype};
    return t;
}

static double distance(const pk_mat *a, const pk_mat *b) {
    double worst = 0;
    for (size_t i = 0; i < bytes(a); i += (size_t)pk_dtype_size(a->dtype)) {
        const double x = scalar_load(a->dtype, (char *)a->data + i), y = scalar_load(a->dtype, (char *)b->data + i);
        worst = fmax(worst, fabs(x - y) / (1 + fabs(x)));
    }
    return worst;
}

static void test_merge(const char *isa, pk_dtype dtype) {
    const double eps[] = {1e-5, 1e-13, 1.0 / 64, 1.0 / 512};
    const int64_t n = 1 + below(90), k = 1 + below(below(4) ? 90 : 1300), r = below(24);
    const pk_dtype adapter = below(2) ? dtype : PK_F32;
    pk_lowrank f = {make(r, k, adapter, 0.3), make(n, r, adapter, 0.3), 0.7};
    const pk_delta d = {PK_LOWRANK, &f, 1, {0}, 1.0};
    pk_mat w = make(n, k, dtype, 1), reference = copy(&w), old = copy(&w);
    const size_t bound = pk_record_bound(&w);
    pk_record record = {malloc(bound), bound, 0}, second = {malloc(bound), bound, 0};
    void *const work = malloc(pk_merge_work(&w, &d, &d));
    pk_isa_select("generic");
    expect(pk_merge(&reference, &d, 0, NULL, work, NULL) == PK_OK, "merge", (int)dtype);
    pk_isa_select(isa);
    expect(pk_merge(&w, &d, PK_CHECK, &record, work, shim_parallel) == PK_OK, "merge with record", (int)dtype);
    expect(distance(&w, &reference) < eps[dtype], "merge equals generic", (int)dtype);
    pk_record tight = {malloc(record.size), record.size, record.size};
    memcpy(tight.data, record.data, record.size);
    expect(pk_switch(&w, &d, &tight, &d, 0, &second, work, shim_parallel) == PK_OK, "switch", (int)dtype);
    expect(pk_unmerge(&w, &d, &second, work, shim_parallel) == PK_OK, "unmerge", (int)dtype);
    expect(memcmp(w.data, old.data, bytes(&w)) == 0, "unmerge is exact", (int)dtype);
    expect(pk_merge(&w, &d, 0, &record, work, shim_parallel) == PK_OK, "merge again", (int)dtype);
    for (int i = 0; i < 20; i++) ((unsigned char *)record.data)[below((int64_t)record.size)] = (unsigned char)next();
    expect(pk_unmerge(&w, &d, &record, work, NULL) >= 0, "a damaged record is survived", (int)dtype);
    void *const all[] = {f.down.data, f.up.data,  w.data, reference.data, old.data, record.data,
                         second.data, tight.data, work};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void test_forward_backward(const char *isa, pk_dtype dtype) {
    const double eps[] = {1e-4, 1e-12, 1.0 / 32, 1.0 / 256};
    const int64_t m = 1 + below(40), n = 1 + below(150), k = 1 + below(150), r = 1 + below(150);
    const pk_dtype adapter = below(2) ? dtype : PK_F32;
    pk_lowrank f = {make(r, k, adapter, 0.1), make(n, r, adapter, 0.1), 0.7};
    pk_mat x = make(m, k, dtype, 1), g = make(m, n, dtype, 1), y[2], dx[2], da[2], db[2];
    y[0] = make(m, n, dtype, 1);
    dx[0] = make(m, k, dtype, 1);
    da[0] = make(r, k, adapter, 1);
    db[0] = make(n, r, adapter, 1);
    y[1] = copy(&y[0]);
    dx[1] = copy(&dx[0]);
    da[1] = copy(&da[0]);
    db[1] = copy(&db[0]);
    for (int i = 0; i < 2; i++) {
        pk_isa_select(i ? isa : "generic");
        void *work = malloc(pk_lowrank_apply_work(&y[i], &x, &f, 1));
        expect(pk_lowrank_apply(&y[i], &x, &f, 1, NULL, work, shim_parallel) == PK_OK, "forward", (int)dtype);
        free(work);
        const pk_backward q = {g, x, {0}, {0}, f, dx[i], da[i], db[i], 1};
        work = malloc(pk_lowrank_backward_work(&q));
        expect(pk_lowrank_backward(&q, work, shim_parallel) == PK_OK, "backward", (int)dtype);
        free(work);
    }
    expect(distance(&y[0], &y[1]) < eps[dtype], "forward equals generic", (int)dtype);
    expect(distance(&dx[0], &dx[1]) < eps[dtype], "dx equals generic", (int)dtype);
    expect(distance(&da[0], &da[1]) < eps[dtype], "dA equals generic", (int)dtype);
    expect(distance(&db[0], &db[1]) < eps[dtype], "dB equals generic", (int)dtype);
    expect(pk_finite(&y[1], shim_parallel) == 1, "finite", (int)dtype);
    void *const all[] = {f.down.data, f.up.data, x.data, g.data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    for (int i = 0; i < 2; i++) {
        free(y[i].data);
        free(dx[i].data);
        free(da[i].data);
        free(db[i].data);
    }
}

static void test_linear(const char *isa, pk_dtype dtype) {
    const double eps[] = {1e-4, 0, 1.0 / 32, 1.0 / 256};
    const int64_t m = 1 + below(240), n = 1 + below(300), k = 1 + below(300), r = 1 + below(20);
    pk_lowrank f = {make(r, k, dtype, 0.1), make(n, r, dtype, 0.1), 0.7};
    pk_mat x = make(m, k, dtype, 1), g = make(m, n, dtype, 1), w = make(n, k, dtype, 0.1), bias = make(1, n, dtype, 1);
    pk_mat t = make(m, r, PK_F32, 1), y[2] = {make(m, n, dtype, 1)}, set[2], dx[2] = {make(m, k, dtype, 1)};
    const pk_mat wt = turned(&w);
    const pk_lowrank ft = {turned(&f.up), turned(&f.down), 0.7};
    int64_t *const ids = malloc((size_t)m * sizeof *ids);
    for (int64_t i = 0; i < m; i++) ids[i] = below(k);
    y[1] = copy(&y[0]);
    dx[1] = copy(&dx[0]);
    for (int i = 0; i < 2; i++) {
        pk_isa_select(i ? isa : "generic");
        set[i] = copy(&y[0]);
        void *work = malloc(pk_lowrank_apply_work(&set[i], &x, &f, 1));
        expect(pk_lowrank_set(&set[i], &x, &f, 1, &t, work, shim_parallel) == PK_OK, "set", (int)dtype);
        free(work);
        work = malloc(pk_linear_work(&y[i], &x, &w, &f, 1));
        expect(pk_linear(&y[i], &x, &w, &bias, &f, 1, &t, work, shim_parallel) == PK_OK, "linear", (int)dtype);
        free(work);
        work = malloc(pk_lookup_apply_work(&y[i], &f, 1));
        expect(pk_lookup_apply(&y[i], ids, &f, 1, work, shim_parallel) == PK_OK, "lookup", (int)dtype);
        free(work);
        work = malloc(pk_linear_work(&dx[i], &g, &wt, &ft, 1));
        expect(pk_linear(&dx[i], &g, &wt, NULL, &ft, 1, NULL, work, shim_parallel) == PK_OK, "turned", (int)dtype);
        free(work);
    }
    expect(distance(&y[0], &y[1]) < eps[dtype], "linear equals generic", (int)dtype);
    expect(distance(&set[0], &set[1]) < eps[dtype], "set equals generic", (int)dtype);
    expect(distance(&dx[0], &dx[1]) < eps[dtype], "turned equals generic", (int)dtype);
    free(ids);
    void *const all[] = {f.down.data, f.up.data, x.data,      g.data,      w.data,     bias.data, t.data,
                         y[0].data,   y[1].data, set[0].data, set[1].data, dx[0].data, dx[1].data};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

int main(int argc, char **argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 20;
    const char *isa;
    for (int i = 0; (isa = pk_isa_list(i)) != NULL; i++) {
        for (int q = 0; q < rounds; q++)
            for (int dtype = 0; dtype < PK_NDTYPES; dtype++) {
                test_merge(isa, (pk_dtype)dtype);
                test_forward_backward(isa, (pk_dtype)dtype);
                if (dtype != PK_F64) test_linear(isa, (pk_dtype)dtype);
            }
        printf("%s: %s\n", isa, failures ? "failed" : "ok");
    }
    return failures != 0;
}
