/* Merges of bfloat16 and float16 tensors in one pass over their bytes: read, widen, merge, round, tile by tile.
 *
 * Each function does what torch_ops.py does for the same operation, element by element in the same order, with every
 * product and sum rounded to float32 (nothing is contracted: see setup.py), so results are the same bit for bit.
 * Sums over many elements are float64, in an order of their own.
 *
 * `models` are n runs of as many elements, `base` is one more or NULL; `start` is the index of the first element. Where
 * something is kept by rank, they are whole rows of `row` elements; else `row` is 0.
 * NaN goes through: a comparison with it is false, and is asked so that false keeps the number.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TILE 512 /* elements: what one step leaves for the next stays in the nearest cache */
#define LANES 16 /* partial sums side by side, so that no sum waits for the one before */

/* One build for every x86-64: the widest instructions that the machine has are chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif
#if defined(_MSC_VER) && !defined(__clang__)
#define EXPORT __declspec(dllexport)
#define INLINE static __forceinline
#define restrict __restrict
#pragma fp_contract(off)
#elif defined(_WIN32)
#define EXPORT __declspec(dllexport)
#define INLINE static inline __attribute__((always_inline))
#else
#define EXPORT __attribute__((visibility("default"))) FOR_EVERY_CPU
#define INLINE static inline __attribute__((always_inline))
#endif

typedef float Tile[TILE];

/* Elements one behind the other in memory: bfloat16, or float16 where `half` is set. */
typedef struct {
    uint16_t *words;
    size_t count;
    int64_t half;
} Run;

/* Which elements of a delta are kept. By size: above `low` (or equal to it, at an index before low_end), but not above
 * `high` (likewise). By chance: whose 16-bit draw is below the limit (draws.py). By rank: with a probability that rises
 * with the rank of the size in its row, and divided by it where `divide` is set (operations.ByRank). */
enum { EVERYTHING, BY_SIZE, BY_CHANCE, BY_RANK };
typedef struct {
    int64_t how, low_end, high_end, divide;
    uint64_t key;
    float low, high, limit, lowest, half_step;
} Keep;

/* What becomes of the sizes of one row, by their level: 64 levels to a factor of two, the last is the largest size's. */
#define LEVELS 1025
typedef struct {
    int32_t first; /* the coarse size that has level 0, as have all below */
    float limit[LEVELS], factor[LEVELS];
} Ranks;

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

INLINE uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

INLINE float number_of(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* The smallest exponents differ by 112, and the largest ones are infinity and NaN in both. */
INLINE float of_half(uint16_t half)
{
    uint32_t size = (uint32_t)(half & 0x7FFF) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t finite = bits_of(number_of(size) * 0x1p112f);
    return number_of((size < 0x7C00u << 13 ? finite : size | 0x7F800000) | sign);
}

/* To nearest, ties to even. Adding 0.5 to what is below 2^-14 rounds it: the sum's last bit is a float16's last there. */
INLINE uint16_t to_half(float number)
{
    uint32_t bits = bits_of(number), size = bits & 0x7FFFFFFF;
    uint32_t normal = (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
    uint32_t subnormal = bits_of(number_of(size) + 0.5f) - bits_of(0.5f);
    uint32_t half = size < 113u << 23 ? subnormal : normal;
    half = size < 0x477FF000 ? half : 0x7C00; /* from 65520 on infinity */
    half = size > 0x7F800000 ? 0x7E00 : half;
    return (uint16_t)(half | (bits >> 16 & 0x8000));
}

INLINE uint16_t to_bfloat16(float number)
{
    uint32_t bits = bits_of(number);
    return (uint16_t)(number == number ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0);
}

INLINE void widen(float *restrict tile, const Run *run, size_t done, size_t length)
{
    const uint16_t *restrict words = run->words + done;
    if (run->half)
        for (size_t i = 0; i < length; i++) tile[i] = of_half(words[i]);
    else
        for (size_t i = 0; i < length; i++) tile[i] = number_of((uint32_t)words[i] << 16);
}

INLINE void round_off(const Run *run, size_t done, const float *restrict tile, size_t length)
{
    uint16_t *restrict words = run->words + done;
    if (run->half)
        for (size_t i = 0; i < length; i++) words[i] = to_half(tile[i]);
    else
        for (size_t i = 0; i < length; i++) words[i] = to_bfloat16(tile[i]);
}

/* A model's tile, less the base's where there is one. */
INLINE void load(float *restrict tile, const float *base, const Run *model, size_t done, size_t length)
{
    widen(tile, model, done, length);
    if (base)
        for (size_t i = 0; i < length; i++) tile[i] -= base[i];
}

/* Zero what isn't above a threshold; of what equals it, what comes at or after the index `end`. */
INLINE void keep_above(float *restrict delta, float threshold, int64_t end, size_t start, size_t length)
{
    size_t equal = end <= (int64_t)start ? 0 : least((size_t)end - start, length);
    for (size_t i = 0; i < equal; i++) delta[i] = fabsf(delta[i]) < threshold ? 0.0f : delta[i];
    for (size_t i = equal; i < length; i++) delta[i] = fabsf(delta[i]) <= threshold ? 0.0f : delta[i];
}

/* The opposite. */
INLINE void drop_above(float *restrict delta, float threshold, int64_t end, size_t start, size_t length)
{
    size_t equal = end <= (int64_t)start ? 0 : least((size_t)end - start, length);
    for (size_t i = 0; i < equal; i++) delta[i] = fabsf(delta[i]) >= threshold ? 0.0f : delta[i];
    for (size_t i = equal; i < length; i++) delta[i] = fabsf(delta[i]) > threshold ? 0.0f : delta[i];
}

/* The 16-bit draws of the elements from `start` on; the array's first is that of the even element at or before it. */
INLINE const int16_t *draw(int16_t drawn[TILE + 2], uint64_t key, size_t start)
{
    uint32_t words[TILE / 2 + 1];
    uint32_t first = (uint32_t)(start / 2) + (uint32_t)key, high = (uint32_t)(key >> 32);
    for (uint32_t i = 0; i < TILE / 2 + 1; i++) {
        uint32_t word = first + i;
        word = ((word ^ word >> 16) * 0x7FEB352Du) ^ high;
        word = (word ^ word >> 15) * 0x846CA68Bu;
        words[i] = word ^ word >> 16;
    }
    memcpy(drawn, words, sizeof words);
    return drawn + start % 2;
}

INLINE void keep_by_chance(float *restrict delta, uint64_t key, float limit, size_t start, size_t length)
{
    int16_t drawn[TILE + 2];
    const int16_t *own = draw(drawn, key, start);
    for (size_t i = 0; i < length; i++) delta[i] *= (float)own[i] < limit ? 1.0f : 0.0f;
}

/* The size of a delta as bits, which order like it. */
INLINE int32_t size_bits(float delta) { return (int32_t)(bits_of(delta) & 0x7FFFFFFF); }

/* A size to 7 significant bits, as an integer that orders like it. */
INLINE int32_t coarse(float delta) { return size_bits(delta) >> 17; }

/* Rank the sizes of the row that begins `done` elements into the block, by counting them by level; equal levels share
 * their mean rank. */
INLINE void rank_row(Ranks *ranks, const Keep *keep, const Run *base, const Run *model, size_t row, size_t done)
{
    Tile origin, delta;
    int32_t largest = 0, counts[2][LEVELS] = {{0}};
    /* the row's largest size: it has the last level, and tells which size has level 0 */
    for (size_t first = 0, length; first < row; first += length) {
        length = least(TILE, row - first);
        widen(origin, base, done + first, length);
        load(delta, origin, model, done + first, length);
        for (size_t i = 0; i < length; i++) {
            int32_t size = coarse(delta[i]);
            largest = size > largest ? size : largest;
        }
    }
    ranks->first = largest - (LEVELS - 1);
    /* a histogram of the levels; sizes below level 0 have it too */
    for (size_t first = 0, length; first < row; first += length) {
        length = least(TILE, row - first);
        widen(origin, base, done + first, length);
        load(delta, origin, model, done + first, length);
        for (size_t i = 0; i < length; i++) {
            int32_t level = coarse(delta[i]) - ranks->first;
            counts[i % 2][level < 0 ? 0 : level]++; /* in turns: neighbours are often alike, and would wait */
        }
    }
    /* The elements of a level have the ranks up_to - count ... up_to - 1: twice their mean is 2 * up_to - count - 1. It
     * gives the level its chance, and that the limit that a 16-bit draw has to be below (operations.draw_limit). */
    int64_t up_to = 0;
    for (size_t level = 0; level < LEVELS; level++) {
        int64_t count = counts[0][level] + counts[1][level];
        up_to += count;
        float chance = (float)(2 * up_to - count - 1) * keep->half_step + keep->lowest;
        ranks->limit[level] = (chance - 0.5f) * 65536.0f - 0.5f;
        ranks->factor[level] = keep->divide ? 1.0f / chance : 1.0f;
    }
}

INLINE void keep_by_rank(float *restrict delta, const Ranks *ranks, uint64_t key, size_t start, size_t length)
{
    int16_t drawn[TILE + 2];
    const int16_t *own = draw(drawn, key, start);
    int32_t levels[TILE];
    Tile limits, factors;
    for (size_t i = 0; i < length; i++) {
        int32_t level = coarse(delta[i]) - ranks->first;
        levels[i] = level < 0 ? 0 : level;
    }
    for (size_t i = 0; i < length; i++) {
        limits[i] = ranks->limit[levels[i]];
        factors[i] = ranks->factor[levels[i]];
    }
    for (size_t i = 0; i < length; i++) delta[i] *= (float)own[i] < limits[i] ? factors[i] : 0.0f;
}

/* What is kept of a model's delta, in the tile that begins `done` elements into the block. */
INLINE void load_kept(float *restrict delta, const float *origin, const Run *base, const Run *model,
                      const Keep *keep, Ranks *ranks, size_t row, size_t start, size_t done, size_t length)
{
    load(delta, origin, model, done, length);
    if (keep->how == BY_SIZE) {
        if (keep->high < INFINITY) drop_above(delta, keep->high, keep->high_end, start + done, length);
        keep_above(delta, keep->low, keep->low_end, start + done, length);
    } else if (keep->how == BY_CHANCE)
        keep_by_chance(delta, keep->key, keep->limit, start + done, length);
    else if (keep->how == BY_RANK) {
        if (done % row == 0) rank_row(ranks, keep, base, model, row, done);
        keep_by_rank(delta, ranks, keep->key, start + done, length);
    }
}

/* Elements of the tile that begins `done` elements into the block: no tile reaches into the next row. */
INLINE size_t tile_length(size_t done, size_t count, size_t row)
{
    size_t length = least(TILE, count - done);
    return row ? least(length, row - done % row) : length;
}

/* out = numbers */
EXPORT void cast(const Run *out, const float *numbers)
{
    for (size_t done = 0; done < out->count; done += TILE)
        round_off(out, done, numbers + done, least(TILE, out->count - done));
}

/* out = (sum of coefficient * model) / divisor, or base + (sum of coefficient * what is kept of model - base) / divisor */
EXPORT void merge_sum(const Run *out, const Run *base, const Run *models, size_t n, const float *coefficients,
                      float divisor, const Keep *keeps, size_t row, size_t start)
{
    size_t count = out->count;
    Tile origin, total, delta;
    Ranks ranks[row ? n : 1];
    for (size_t done = 0, length; done < count; done += length) {
        length = tile_length(done, count, row);
        if (base) widen(origin, base, done, length);
        for (size_t k = 0; k < n; k++) {
            load_kept(delta, base ? origin : NULL, base, &models[k], &keeps[k], &ranks[row ? k : 0], row, start, done,
                      length);
            float coefficient = coefficients[k];
            if (k == 0)
                for (size_t i = 0; i < length; i++) total[i] = delta[i] * coefficient;
            else
                for (size_t i = 0; i < length; i++) total[i] += delta[i] * coefficient;
        }
        if (divisor != 1.0f)
            for (size_t i = 0; i < length; i++) total[i] /= divisor;
        if (base)
            for (size_t i = 0; i < length; i++) total[i] += origin[i];
        round_off(out, done, total, length);
    }
}

/* Vote * delta elects a sign; what has it is summed up, times share, and divided by the sum of the weights of those
 * that agree where there are weights. out = base + scale * that */
EXPORT void merge_elected(const Run *out, const Run *base, const Run *models, size_t n, const float *votes,
                          const float *shares, const float *weights, float scale, const Keep *keeps, size_t row,
                          size_t start)
{
    size_t count = out->count;
    Tile origin, total, sign, merged, support, deltas[n];
    Ranks ranks[row ? n : 1];
    int positive = 1; /* no weight is below zero */
    for (size_t k = 0; weights && k < n; k++) positive &= weights[k] >= 0;
    for (size_t done = 0, length; done < count; done += length) {
        length = tile_length(done, count, row);
        widen(origin, base, done, length);
        for (size_t k = 0; k < n; k++) {
            float *delta = deltas[k], vote = votes[k];
            load_kept(delta, origin, base, &models[k], &keeps[k], &ranks[row ? k : 0], row, start, done, length);
            for (size_t i = 0; i < length; i++) delta[i] *= vote;
            if (k == 0)
                for (size_t i = 0; i < length; i++) total[i] = delta[i];
            else
                for (size_t i = 0; i < length; i++) total[i] += delta[i];
        }
        for (size_t i = 0; i < length; i++) sign[i] = total[i] >= 0 ? 1.0f : -1.0f;
        for (size_t k = 0; k < n; k++) {
            float *delta = deltas[k], share = shares[k], weight = weights ? weights[k] : 0;
            for (size_t i = 0; i < length; i++) {
                float size = delta[i] * sign[i];
                size = size < 0 ? 0 : size;
                float agreeing = (size > 0 ? 1.0f : 0.0f) * weight;
                merged[i] = k ? merged[i] + size * share : size * share;
                support[i] = k ? support[i] + agreeing : agreeing;
            }
        }
        for (size_t i = 0; i < length; i++) merged[i] *= sign[i] * scale;
        if (weights && positive)
            for (size_t i = 0; i < length; i++) merged[i] /= support[i] < FLT_MIN ? FLT_MIN : support[i];
        else if (weights)
            for (size_t i = 0; i < length; i++) merged[i] /= support[i] == 0 ? 1.0f : support[i];
        for (size_t i = 0; i < length; i++) merged[i] += origin[i];
        round_off(out, done, merged, length);
    }
}

INLINE void add_sizes(double lanes[LANES], const float *delta)
{
    for (size_t i = 0; i < TILE; i += LANES)
        for (size_t l = 0; l < LANES; l++) lanes[l] += (double)fabsf(delta[i + l]);
}

/* sums[k] = sum of |delta|, sums[n + k] = of what is kept of it */
EXPORT void lengths(double *sums, const Run *base, const Run *models, size_t n, const Keep *keeps, size_t row,
                    size_t start)
{
    size_t count = base->count;
    Tile origin, delta;
    Ranks ranks[row ? n : 1];
    double lanes[2 * n][LANES];
    memset(lanes, 0, sizeof lanes);
    for (size_t done = 0, length; done < count; done += length) {
        length = tile_length(done, count, row);
        if (length < TILE) memset(delta, 0, sizeof delta); /* what is added up beyond the last element */
        widen(origin, base, done, length);
        for (size_t k = 0; k < n; k++) {
            load(delta, origin, &models[k], done, length);
            add_sizes(lanes[k], delta);
            load_kept(delta, origin, base, &models[k], &keeps[k], &ranks[row ? k : 0], row, start, done, length);
            add_sizes(lanes[n + k], delta);
        }
    }
    for (size_t k = 0; k < 2 * n; k++) {
        sums[k] = 0;
        for (size_t l = 0; l < LANES; l++) sums[k] += lanes[k][l];
    }
}

/* The inner products of the deltas (of the models where there is no base): the lower triangle, row by row. */
EXPORT void inner_products(double *products, const Run *base, const Run *models, size_t n)
{
    size_t count = models->count;
    Tile origin, delta;
    double wide[n][TILE], lanes[n * (n + 1) / 2][LANES];
    memset(lanes, 0, sizeof lanes);
    for (size_t done = 0; done < count; done += TILE) {
        size_t length = least(TILE, count - done), place = 0;
        if (length < TILE) memset(delta, 0, sizeof delta); /* what is multiplied beyond the last element */
        if (base) widen(origin, base, done, length);
        for (size_t k = 0; k < n; k++) {
            load(delta, base ? origin : NULL, &models[k], done, length);
            for (size_t i = 0; i < TILE; i++) wide[k][i] = delta[i];
            for (size_t j = 0; j <= k; j++, place++)
                for (size_t i = 0; i < TILE; i += LANES)
                    for (size_t l = 0; l < LANES; l++) lanes[place][l] += wide[k][i + l] * wide[j][i + l];
        }
    }
    for (size_t place = 0; place < n * (n + 1) / 2; place++) {
        products[place] = 0;
        for (size_t l = 0; l < LANES; l++) products[place] += lanes[place][l];
    }
}

/* counts[i] += deltas by the upper 16 bits of their size: taking 1 off first gives zero, and nothing else, the first bin */
EXPORT void count_upper_bits(int64_t *counts, const Run *base, const Run *model)
{
    Tile origin, delta;
    for (size_t done = 0, length; done < base->count; done += length) {
        length = least(TILE, base->count - done);
        widen(origin, base, done, length);
        load(delta, origin, model, done, length);
        for (size_t i = 0; i < length; i++) counts[((size_bits(delta[i]) - 1) >> 16) + 1]++;
    }
}

/* counts[i] += deltas whose size has the bits first + i */
EXPORT void count_lower_bits(int64_t *counts, size_t bins, const Run *base, const Run *model, int32_t first)
{
    Tile origin, delta;
    for (size_t done = 0, length; done < base->count; done += length) {
        length = least(TILE, base->count - done);
        widen(origin, base, done, length);
        load(delta, origin, model, done, length);
        for (size_t i = 0; i < length; i++) {
            uint32_t bin = (uint32_t)size_bits(delta[i]) - (uint32_t)first;
            if (bin < bins) counts[bin]++;
        }
    }
}

/* counts[0] += deltas whose size is above zero, counts[1] += above the threshold, counts[2 + i] += equal to it at an
 * index, of which the first is `start`, in i * step ... (i + 1) * step */
EXPORT void compare_sizes(int64_t *counts, const Run *base, const Run *model, float threshold, size_t start,
                          size_t step)
{
    size_t count = base->count;
    Tile origin, delta;
    for (size_t done = 0; done < count;) {
        size_t bucket = (start + done) / step;
        size_t length = least(least(TILE, count - done), (bucket + 1) * step - start - done);
        int32_t some = 0, above = 0, equal = 0;
        widen(origin, base, done, length);
        load(delta, origin, model, done, length);
        for (size_t i = 0; i < length; i++) {
            float size = fabsf(delta[i]);
            some += size > 0;
            above += size > threshold;
            equal += size == threshold;
        }
        counts[0] += some;
        counts[1] += above;
        counts[2 + bucket] += equal;
        done += length;
    }
}

/* Whether no element is NaN or infinite. */
EXPORT int all_finite(const Run *run)
{
    const uint16_t *words = run->words;
    uint16_t found = 0, largest = run->half ? 0x7C00 : 0x7F80;
    for (size_t i = 0; i < run->count; i++) found |= (words[i] & largest) == largest;
    return !found;
}
