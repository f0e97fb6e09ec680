/* Merges of bfloat16 tensors in one pass over their bytes: read, widen, merge, round, tile by tile.
 *
 * Each function does what the torch expressions of its caller do, element by element in the same order, with every
 * product and sum rounded to float32 (nothing is contracted: see pyproject.toml), so results are the same bit for bit.
 * Sums over many elements are float64, in an order of their own.
 *
 * `models` are n tensors of `count` elements, `base` is one more or NULL; `start` is the index of the first element.
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
#define EXPORT __attribute__((visibility("default"))) FOR_EVERY_CPU
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bfloat16;
typedef float Tile[TILE];

/* Which elements of a delta are kept. By size: above `low` (or equal to it, at an index before low_end), but not above
 * `high` (likewise). By chance: whose 16-bit draw is below the limit (draws.py). */
enum { EVERYTHING, BY_SIZE, BY_CHANCE };
typedef struct {
    int64_t how, low_end, high_end;
    uint64_t key;
    float low, high, limit;
} Keep;

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

INLINE void widen(float *restrict wide, const bfloat16 *restrict narrow, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        uint32_t bits = (uint32_t)narrow[i] << 16;
        memcpy(&wide[i], &bits, sizeof bits);
    }
}

INLINE void round_off(bfloat16 *restrict narrow, const float *restrict wide, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        uint32_t bits;
        memcpy(&bits, &wide[i], sizeof bits);
        uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        narrow[i] = (bfloat16)(wide[i] == wide[i] ? rounded : 0x7FC0);
    }
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

INLINE void keep_by_chance(float *restrict delta, uint64_t key, float limit, size_t start, size_t length)
{
    uint32_t words[TILE / 2 + 1];
    int16_t drawn[TILE + 2];
    uint32_t first = (uint32_t)(start / 2) + (uint32_t)key, high = (uint32_t)(key >> 32);
    for (uint32_t i = 0; i < TILE / 2 + 1; i++) {
        uint32_t word = first + i;
        word = ((word ^ word >> 16) * 0x7FEB352Du) ^ high;
        word = (word ^ word >> 15) * 0x846CA68Bu;
        words[i] = word ^ word >> 16;
    }
    memcpy(drawn, words, sizeof drawn);
    const int16_t *own = drawn + start % 2;
    for (size_t i = 0; i < length; i++) delta[i] *= (float)own[i] < limit ? 1.0f : 0.0f;
}

/* A model's tile, less the base's where there is one. */
INLINE void load(float *restrict tile, const float *base, const bfloat16 *model, size_t length)
{
    widen(tile, model, length);
    if (base)
        for (size_t i = 0; i < length; i++) tile[i] -= base[i];
}

INLINE void thin_out(float *restrict delta, const Keep *keep, size_t start, size_t length)
{
    if (keep->how == BY_SIZE) {
        if (keep->high < INFINITY) drop_above(delta, keep->high, keep->high_end, start, length);
        keep_above(delta, keep->low, keep->low_end, start, length);
    } else if (keep->how == BY_CHANCE)
        keep_by_chance(delta, keep->key, keep->limit, start, length);
}

/* out = (sum of coefficient * model) / divisor, or base + (sum of coefficient * what is kept of model - base) / divisor */
EXPORT void merge_sum(bfloat16 *out, const bfloat16 *base, const bfloat16 *const *models, size_t n,
                      const float *coefficients, float divisor, const Keep *keeps, size_t start, size_t count)
{
    Tile origin, total, delta;
    for (size_t done = 0; done < count; done += TILE) {
        size_t length = least(TILE, count - done);
        if (base) widen(origin, base + done, length);
        for (size_t k = 0; k < n; k++) {
            load(delta, base ? origin : NULL, models[k] + done, length);
            thin_out(delta, &keeps[k], start + done, length);
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
        round_off(out + done, total, length);
    }
}

/* Vote * delta elects a sign; what has it is summed up, times share, and divided by the sum of the weights of those
 * that agree where there are weights. out = base + scale * that */
EXPORT void merge_elected(bfloat16 *out, const bfloat16 *base, const bfloat16 *const *models, size_t n,
                          const float *votes, const float *shares, const float *weights, float scale,
                          const Keep *keeps, size_t start, size_t count)
{
    Tile origin, total, sign, merged, support, deltas[n];
    int positive = 1; /* no weight is below zero */
    for (size_t k = 0; weights && k < n; k++) positive &= weights[k] >= 0;
    for (size_t done = 0; done < count; done += TILE) {
        size_t length = least(TILE, count - done);
        widen(origin, base + done, length);
        for (size_t k = 0; k < n; k++) {
            float *delta = deltas[k], vote = votes[k];
            load(delta, origin, models[k] + done, length);
            thin_out(delta, &keeps[k], start + done, length);
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
        round_off(out + done, merged, length);
    }
}

/* sums[k] = sum of |delta|, sums[n + k] = of what is kept of it */
EXPORT void lengths(double *sums, const bfloat16 *base, const bfloat16 *const *models, size_t n, const Keep *keeps,
                    size_t start, size_t count)
{
    Tile origin, delta;
    double lanes[2 * n][LANES];
    memset(lanes, 0, sizeof lanes);
    for (size_t done = 0; done < count; done += TILE) {
        size_t length = least(TILE, count - done);
        widen(origin, base + done, length);
        for (size_t k = 0; k < n; k++) {
            memset(delta, 0, sizeof delta);
            load(delta, origin, models[k] + done, length);
            for (size_t i = 0; i < TILE; i += LANES)
                for (size_t l = 0; l < LANES; l++) lanes[k][l] += (double)fabsf(delta[i + l]);
            thin_out(delta, &keeps[k], start + done, length);
            for (size_t i = 0; i < TILE; i += LANES)
                for (size_t l = 0; l < LANES; l++) lanes[n + k][l] += (double)fabsf(delta[i + l]);
        }
    }
    for (size_t k = 0; k < 2 * n; k++) {
        sums[k] = 0;
        for (size_t l = 0; l < LANES; l++) sums[k] += lanes[k][l];
    }
}

/* The inner products of the deltas (of the models where there is no base): the lower triangle, row by row. */
EXPORT void inner_products(double *products, const bfloat16 *base, const bfloat16 *const *models, size_t n,
                           size_t count)
{
    Tile origin, deltas[n];
    double lanes[n * (n + 1) / 2][LANES];
    memset(lanes, 0, sizeof lanes);
    memset(deltas, 0, sizeof deltas);
    for (size_t done = 0; done < count; done += TILE) {
        size_t length = least(TILE, count - done), place = 0;
        if (base) widen(origin, base + done, length);
        for (size_t k = 0; k < n; k++) {
            if (length < TILE) memset(deltas[k], 0, sizeof deltas[k]);
            load(deltas[k], base ? origin : NULL, models[k] + done, length);
            for (size_t j = 0; j <= k; j++, place++)
                for (size_t i = 0; i < TILE; i += LANES)
                    for (size_t l = 0; l < LANES; l++)
                        lanes[place][l] += (double)deltas[k][i + l] * (double)deltas[j][i + l];
        }
    }
    for (size_t place = 0; place < n * (n + 1) / 2; place++) {
        products[place] = 0;
        for (size_t l = 0; l < LANES; l++) products[place] += lanes[place][l];
    }
}

/* counts[0] += deltas whose size is above zero, counts[1] += above the threshold, counts[2 + i] += equal to it at an
 * index, of which the first is `start`, in i * step ... (i + 1) * step */
EXPORT void compare_sizes(int64_t *counts, const bfloat16 *base, const bfloat16 *model, float threshold, size_t start,
                          size_t step, size_t count)
{
    Tile origin, delta;
    for (size_t done = 0; done < count;) {
        size_t bucket = (start + done) / step;
        size_t length = least(least(TILE, count - done), (bucket + 1) * step - start - done);
        int32_t some = 0, above = 0, equal = 0;
        widen(origin, base + done, length);
        load(delta, origin, model + done, length);
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
EXPORT int all_finite(const bfloat16 *tensor, size_t count)
{
    uint16_t found = 0;
    for (size_t i = 0; i < count; i++) found |= (tensor[i] & 0x7F80) == 0x7F80;
    return !found;
}
