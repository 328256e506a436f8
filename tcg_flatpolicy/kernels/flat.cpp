// The flat decision on a CPU, in steps: reads legal lists from bytes, scores them, normalises, draws and finds; and goes
// the way back. A plain C interface: it knows neither Python nor torch. Rows are independent of each other, so that a
// row's numbers do not depend on the batch. Compiled once for each set of instructions (see setup.py).
//
// Shapes: B rows, N legal tuples, H values of a tuple, P primaries, W width, E embedding size of a source. A thing is
// a value of a source (a learned row, or an entity of a state) under the projection of one part: of one range of
// values in a slot of a primary.

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

#if defined(__AVX2__)
constexpr int L = 8;  // floats of a vector: wider ones than the machine's are ten times slower
#else
constexpr int L = 4;
#endif
constexpr int WIDE = 4;       // vectors that are worked on together
constexpr int ROWS = 32;      // of a block, whose things are projected together
constexpr int64_t FEW = 1 << 14;  // learned things below this many are found by a table, else by a hash

typedef float vec __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * L), aligned(4), may_alias));

inline vec load(const float* at) { return *(const vec*)at; }
inline void store(float* at, vec value) { *(vec*)at = value; }

inline float sum(vec value) {
  float x[L];
  std::memcpy(x, &value, sizeof x);
  for (int n = L / 2; n; n /= 2)
    for (int i = 0; i < n; i++) x[i] += x[i + n];
  return x[0];
}

inline vec positive(vec value) { return value < 0 ? vec{} : value; }  // NaN stays

inline uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 29);
}

// ---- threads

template <typename F>
struct Job {
  const F* work;
  int64_t thread, begin, end;
  bool failed;

  static void* run(void* given) {
    Job* job = (Job*)given;
    try {
      (*job->work)(job->thread, job->begin, job->end);
    } catch (const std::bad_alloc&) {
      job->failed = true;
    }
    return nullptr;
  }
};

constexpr int64_t MOST_THREADS = 64;

int64_t threads_for(int64_t rows, int64_t threads, int64_t rows_each) {
  return std::max<int64_t>(1, std::min({threads, rows / rows_each, MOST_THREADS}));
}

// Calls work(thread, first row, end) for blocks of rows, the last in this thread. False without memory.
template <typename F>
bool over_rows(int64_t rows, int64_t threads, const F& work) {
  Job<F> jobs[MOST_THREADS];
  pthread_t started[MOST_THREADS];
  bool runs[MOST_THREADS], failed = false;
  for (int64_t t = 0; t < threads; t++) {
    jobs[t] = {&work, t, rows * t / threads, rows * (t + 1) / threads, false};
    runs[t] = t + 1 < threads && pthread_create(&started[t], nullptr, Job<F>::run, &jobs[t]) == 0;
    if (!runs[t]) Job<F>::run(&jobs[t]);
  }
  for (int64_t t = 0; t < threads; t++) {
    if (runs[t]) pthread_join(started[t], nullptr);
    failed |= jobs[t].failed;
  }
  return !failed;
}

}  // namespace

// ---- reading

extern "C" {

struct Number {  // an integer of each row, or of each of a row's tuples
  int64_t offset, size, is_signed, stride;
};

struct View {
  int64_t row_bytes, values, room, ids;
  Number count;
  const Number* columns;   // (H)
  const int64_t* limits;   // (ids, H): each value is below that of its primary
};
}

namespace {

template <typename T>
inline int64_t number(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return (int64_t)value;  // beyond int64 it is negative, and refused as such
}

template <typename T>
void column(const uint8_t* at, int64_t stride, int64_t count, int64_t values, int64_t* out) {
  for (int64_t i = 0; i < count; i++) out[i * values] = number<T>(at + i * stride);
}

void read_column(const Number& from, const uint8_t* row, int64_t count, int64_t values, int64_t* out) {
  const uint8_t* at = row + from.offset;
  switch (from.size * 2 + from.is_signed) {
    case 2: return column<uint8_t>(at, from.stride, count, values, out);
    case 3: return column<int8_t>(at, from.stride, count, values, out);
    case 4: return column<uint16_t>(at, from.stride, count, values, out);
    case 5: return column<int16_t>(at, from.stride, count, values, out);
    case 8: return column<uint32_t>(at, from.stride, count, values, out);
    case 9: return column<int32_t>(at, from.stride, count, values, out);
    default: return column<int64_t>(at, from.stride, count, values, out);
  }
}

// The first row from begin on that is not as it should be, or -1.
int64_t read_rows(const View* v, const uint8_t* bytes, const int64_t* starts, int64_t* counts, int64_t* actions,
                  int64_t begin, int64_t end) {
  const int64_t H = v->values;
  std::vector<int32_t> table;  // places of a row's tuples, by hash; 0 is none
  for (int64_t b = begin; b < end; b++) {
    const int64_t n = counts[b];
    int64_t* tuples = actions + starts[b] * H;
    for (int64_t j = 0; j < H; j++) read_column(v->columns[j], bytes + b * v->row_bytes, n, H, tuples + j);
    bool bad = false;
    for (int64_t i = 0; i < n; i++) {
      const uint64_t* tuple = (const uint64_t*)tuples + i * H;
      const bool known = tuple[0] < (uint64_t)v->ids;
      const uint64_t* limits = (const uint64_t*)v->limits + (known ? tuple[0] * H : 0);
      for (int64_t j = 0; j < H; j++) bad |= tuple[j] >= limits[j];
      bad |= !known;
    }
    if (bad) return b;
    if (n < 2) continue;
    size_t size = 4;
    while (size < 2 * (size_t)n) size *= 2;
    table.assign(size, 0);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {
      const int64_t* tuple = tuples + i * H;
      uint64_t hash = 0;
      for (int64_t j = 0; j < H; j++) hash = mix(hash, tuple[j]);
      size_t at = hash & (size - 1);
      while (table[at] && std::memcmp(tuples + (table[at] - 1) * H, tuple, 8 * H)) at = (at + 1) & (size - 1);
      if (table[at]) continue;
      if (kept < i) std::memcpy(tuples + kept * H, tuple, 8 * H);
      table[at] = (int32_t)++kept;
    }
    counts[b] = kept;
  }
  return -1;
}

}  // namespace

extern "C" {

// Counts (B) and starts (B) of each row -> N; or -1 - row of one whose count is outside 0..room.
int64_t tcg_count(const View* v, const uint8_t* bytes, int64_t rows, int64_t* counts, int64_t* starts) {
  int64_t total = 0;
  for (int64_t b = 0; b < rows; b++) {
    read_column(v->count, bytes + b * v->row_bytes, 1, 1, counts + b);
    if ((uint64_t)counts[b] > (uint64_t)v->room) return -1 - b;
    starts[b] = total;
    total += counts[b];
  }
  return total;
}

// Then the tuples (N, H), each once in a row, and the row of each (N) -> how many they are; or -1 - row of one that holds
// a value that is not within the limits; or INT64_MIN without memory. Counts and starts follow what is left.
int64_t tcg_read(const View* v, const uint8_t* bytes, int64_t rows, int64_t threads, int64_t* counts, int64_t* starts,
                 int64_t* actions, int64_t* row_of) {
  threads = threads_for(rows, threads, 256);
  int64_t broken[MOST_THREADS];
  const bool done = over_rows(rows, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    broken[thread] = read_rows(v, bytes, starts, counts, actions, begin, end);
  });
  if (!done) return INT64_MIN;
  for (int64_t t = 0; t < threads; t++)
    if (broken[t] >= 0) return -1 - broken[t];
  int64_t total = 0;
  for (int64_t b = 0; b < rows; b++) {
    const int64_t n = counts[b];
    if (total < starts[b]) std::memmove(actions + total * v->values, actions + starts[b] * v->values, 8 * n * v->values);
    starts[b] = total;
    for (int64_t i = 0; i < n; i++) row_of[total + i] = b;
    total += n;
  }
  return total;
}

// ---- the categorical of a row

namespace {

// Scores (n) -> log-probabilities (n) -> the entropy; all NaN if a score is NaN or +inf. Only -inf is uniform.
float normalise(int64_t n, const float* score, float* logit) {
  float top = -INFINITY;
  bool sound = true;
  for (int64_t i = 0; i < n; i++) {
    sound &= score[i] < INFINITY;
    top = score[i] > top ? score[i] : top;
  }
  double total = 0, weighted = 0;
  for (int64_t i = 0; i < n; i++) {
    const float below = top == -INFINITY ? 0 : score[i] - top, p = std::exp(below);
    logit[i] = below;
    total += p;
    if (p > 0) weighted += (double)p * below;
  }
  const float log_sum = !sound ? NAN : n ? (float)std::log(total) : 0;
  for (int64_t i = 0; i < n; i++) logit[i] -= log_sum;
  return !sound ? NAN : n ? (float)(std::log(total) - weighted / total) : 0;
}

// With p the probabilities, l their logs and H the entropy: d l_i / d s_j = (i == j) - p_j, d H / d s_j = -p_j (l_j + H).
// A row of only -inf has no gradient.
void normalise_back(int64_t n, const float* score, const float* logit, float entropy, const float* of_logit,
                    float of_entropy, float* of_score) {
  double total = 0;
  bool dead = true;
  for (int64_t i = 0; i < n; i++) {
    dead &= score[i] == -INFINITY;
    total += of_logit[i];
  }
  for (int64_t i = 0; i < n; i++) {
    const double p = std::exp((double)logit[i]);  // in double: the difference may be of equals
    const double of_h = p > 0 ? of_entropy * p * ((double)logit[i] + entropy) : 0;
    of_score[i] = dead ? 0 : (float)(of_logit[i] - p * total - of_h);
  }
}

}  // namespace

// ---- scoring

struct Plan {  // what does not change from call to call
  int64_t values, width, ids, primaries, sources, parts;
  const int32_t* place;  // (ids): of each primary among the declared ones, -1 of others
  const int32_t* first;  // (P * slots + 1): where the ranges of a slot begin
  const int64_t *start, *size;  // (ranges): the first value of each range, and how many there are
  const int32_t* part;   // (ranges): its part
  const int32_t *source, *column;              // (parts): of each its source, and which of that source's projections
  const int64_t *sizes, *embedding, *columns;  // (sources): how many values, E, how many parts
  const int32_t* encoded;                      // (sources): whether its values are a state's own
  // (sources): which of the floats its vectors are, from which row on; and its projections, from which on, and how many
  // stand side by side there.
  const int64_t *vectors, *begin, *projections, *leading, *together;
};

struct Call {
  int64_t rows, threads;
  const int64_t *counts, *starts, *tuples;  // (B), (B), (N, H)
  const int64_t* state_of;                  // (B): which of the states is a row's own; or null, if they are in order
  const float *state, *readout;             // (B, W)
  const float* primaries;                   // (P, W)
  const float* const* floats;  // vectors (n, E), or (B, n, E), or those of a table; and projections (E, together * W)
  const int64_t* const* ids;   // of each vectors null; or (B, n), which row of the table is a value's own
  const int64_t* tables;       // of each vectors how many rows the table has
  float *scores;               // (N)
  float *logits, *entropy;     // (N), (B): of the scores; or null
  // Backward:
  const float *of_scores, *of_entropy;  // (N), of the logits where there are; (B)
  float *of_state, *of_readout, *of_primaries;
  float* const* of_floats;  // zeros at first
};
}

namespace {

struct Piece {  // of a source
  const float *vectors, *projections;
  float *of_vectors, *of_projections;
  int64_t stride;  // from a row of the projections to the next, in floats
  const int64_t* ids;
  int64_t table;
};

struct Thing {
  const float* vector;
  float* of_vector;
  int32_t part, row;  // row of its table; of a state's own ~row
};

// The learned things that were met so far: (part, value) -> row of the fixed table.
struct Met {
  std::vector<int32_t> table, rows;
  std::vector<int64_t> keys;
  size_t used = 0;

  explicit Met(int64_t learned) : table(learned <= FEW ? learned : 0, 0) {
    if (learned > FEW) resize(1024);
  }
  void resize(size_t size) {
    std::vector<int64_t> old_keys(size, -1);
    std::vector<int32_t> old_rows(size, 0);
    old_keys.swap(keys);
    old_rows.swap(rows);
    for (size_t i = 0; i < old_keys.size(); i++)
      if (old_keys[i] >= 0) rows[at(old_keys[i])] = old_rows[i];
  }
  size_t at(int64_t key) {
    size_t place = mix(0, key) & (keys.size() - 1);
    while (keys[place] >= 0 && keys[place] != key) place = (place + 1) & (keys.size() - 1);
    keys[place] = key;
    return place;
  }
  int32_t& operator[](int64_t key) {  // 0 at first
    if (!table.empty()) return table[key];
    if (2 * used >= keys.size()) resize(2 * keys.size());
    int32_t& row = rows[at(key)];
    used += row == 0;
    return row;
  }
};

// What all threads of a call share.
struct Shared {
  const Plan* p;
  const Call* c;
  int64_t W, learned, moving;                // W in whole vectors; learned things, things of a state
  std::vector<Piece> pieces;                 // (sources)
  std::vector<int64_t> base;                 // (parts): where the numbers of its things begin among either
  std::vector<const float*> projections;     // (sources), of rows that are whole vectors apart
  std::vector<int64_t> strides;              // in floats
  std::vector<float> padded;                 // projections, where W is no whole number of vectors
  // Backward: of each part its projection (W, E) transposed, rows whole vectors apart, and where it begins.
  std::vector<float> transposed;
  std::vector<int64_t> transposed_at;
};

// x[r] (E) times projection (E, N * L) -> out[r].
template <int M, int N>
inline void tile(const float* const* x, int64_t E, const float* projection, int64_t stride, float* const* out) {
  vec total[M][N] = {};
  for (int64_t e = 0; e < E; e++) {
    vec w[N];
    for (int v = 0; v < N; v++) w[v] = load(projection + e * stride + L * v);
    for (int r = 0; r < M; r++)
      for (int v = 0; v < N; v++) total[r][v] += x[r][e] * w[v];
  }
  for (int r = 0; r < M; r++)
    for (int v = 0; v < N; v++) store(out[r] + L * v, total[r][v]);
}

template <int N>
inline void project(const float* const* x, int64_t m, int64_t E, const float* projection, int64_t stride, float** out) {
  int64_t r = 0;
  for (; r + 6 <= m; r += 6) tile<6, N>(x + r, E, projection, stride, out + r);
  for (; r + 2 <= m; r += 2) tile<2, N>(x + r, E, projection, stride, out + r);
  for (; r < m; r++) tile<1, N>(x + r, E, projection, stride, out + r);
  for (r = 0; r < m; r++) out[r] += N * L;
}

// of_projection (E, N * L) += the sum of x[k] (E) times g[k] (N * L).
template <int M, int N>
inline void outer(const float* const* x, const float* const* g, int64_t m, int64_t e, int64_t w, float* out, int64_t stride) {
  vec total[M][N];
  for (int r = 0; r < M; r++)
    for (int v = 0; v < N; v++) total[r][v] = load(out + (e + r) * stride + L * v);
  for (int64_t k = 0; k < m; k++) {
    vec upstream[N];
    for (int v = 0; v < N; v++) upstream[v] = load(g[k] + w + L * v);
    for (int r = 0; r < M; r++)
      for (int v = 0; v < N; v++) total[r][v] += x[k][e + r] * upstream[v];
  }
  for (int r = 0; r < M; r++)
    for (int v = 0; v < N; v++) store(out + (e + r) * stride + L * v, total[r][v]);
}

struct Worker {
  const Plan* p;
  const Call* c;
  Shared* all;
  const int64_t W, S;  // S: slots
  const bool back;
  Met met;
  std::vector<uint32_t> stamps;  // (things of a state): the row that last held it
  std::vector<int32_t> own_rows;
  std::vector<float> fixed, moving, of_fixed, of_moving;  // tables of (rows, W); a row of zeros, primaries, learned
  std::vector<Thing> learned, own, sorted;                // learned: all so far; own: of this block
  std::vector<int32_t> at;                                // (T, 1 + S) rows of the tables, of a block's tuples
  std::vector<float> hidden, state, readout, of_score, of_state, of_readout, row_of_vector;
  std::vector<const float*> x;
  std::vector<float*> out;
  std::vector<std::vector<float>> of_projections;  // of each source
  int64_t fixed_rows, new_from = 0;
  int64_t broken = 0;  // 1: some tuple is not within the spec; 2: some id is none of its table

  Worker(Shared* all, bool back)
      : p(all->p), c(all->c), all(all), W(all->W), S(all->p->values - 1), back(back), met(all->learned),
        stamps(all->moving, 0), own_rows(all->moving, 0), state(W), readout(W), of_state(W), of_readout(W) {
    fixed_rows = 1 + p->primaries;
    fixed.assign(fixed_rows * W, 0);
    for (int64_t i = 0; i < p->primaries; i++)
      std::memcpy(&fixed[(1 + i) * W], c->primaries + i * p->width, 4 * p->width);
    if (!back) return;
    of_fixed.assign(fixed_rows * W, 0);
    for (int64_t s = 0; s < p->sources; s++) of_projections.emplace_back(p->embedding[s] * p->columns[s] * W, 0.0f);
  }

  // Which table rows the tuples of a row sum, from the block's tuple T on; new things are listed. 0, or what is broken.
  int64_t look_up(int64_t b, int64_t T) {
    const int64_t n = c->counts[b];
    const int64_t* tuple = c->tuples + c->starts[b] * p->values;
    int32_t* row = &at[T * (1 + S)];
    for (int64_t i = 0; i < n; i++, tuple += p->values, row += 1 + S) {
      if ((uint64_t)tuple[0] >= (uint64_t)p->ids || p->place[tuple[0]] < 0) return 1;
      const int64_t place = p->place[tuple[0]];
      row[0] = (int32_t)(1 + place);
      for (int64_t j = 0; j < S; j++) {
        const int32_t* range = p->first + place * S + j;
        if (range[0] == range[1]) {
          row[1 + j] = 0;
          continue;
        }
        int64_t k = range[1] - 1;
        while (k > range[0] && tuple[1 + j] < p->start[k]) k--;
        if ((uint64_t)(tuple[1 + j] - p->start[k]) >= (uint64_t)p->size[k]) return 1;
        const int32_t part = p->part[k];
        int64_t value = tuple[1 + j] - p->start[k];
        const int64_t source = p->source[part], E = p->embedding[source];
        const Piece& piece = all->pieces[source];
        if (piece.ids) {
          value = piece.ids[b * p->sizes[source] + value];
          if ((uint64_t)value >= (uint64_t)piece.table) return 2;
        }
        const int64_t thing = all->base[part] + value;
        if (!p->encoded[source] || piece.ids) {
          int32_t& found = met[thing];
          if (!found) {
            found = (int32_t)fixed_rows++;
            learned.push_back({piece.vectors + value * E, back ? piece.of_vectors + value * E : nullptr, part, found});
          }
          row[1 + j] = found;
          continue;
        }
        if (stamps[thing] != (uint32_t)(b + 1)) {
          stamps[thing] = (uint32_t)(b + 1);
          own_rows[thing] = ~(int32_t)own.size();
          const int64_t where = (b * p->sizes[source] + value) * E;
          own.push_back({piece.vectors + where, back ? piece.of_vectors + where : nullptr, part, own_rows[thing]});
        }
        row[1 + j] = own_rows[thing];
      }
    }
    return 0;
  }

  int64_t state_of(int64_t b) const { return (c->state_of ? c->state_of[b] : b) * p->width; }
  const float* table_row(int32_t row) const { return row >= 0 ? &fixed[row * W] : &moving[~row * W]; }
  float* of_table_row(int32_t row) { return row >= 0 ? &of_fixed[row * W] : &of_moving[~row * W]; }

  // The things of each part, one part after the other: calls work(source, column, things, how many).
  template <typename F>
  void by_part(const Thing* things, int64_t n, F work) {
    std::vector<int64_t> ends(p->parts + 1, 0);
    for (int64_t i = 0; i < n; i++) ends[things[i].part + 1]++;
    for (int64_t g = 0; g < p->parts; g++) ends[g + 1] += ends[g];
    sorted.resize(n);
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (int64_t i = 0; i < n; i++) sorted[next[things[i].part]++] = things[i];
    for (int64_t g = 0; g < p->parts; g++)
      if (ends[g] < ends[g + 1]) work(p->source[g], p->column[g], &sorted[ends[g]], ends[g + 1] - ends[g]);
  }

  void project_things(const Thing* things, int64_t n) {
    by_part(things, n, [&](int64_t s, int64_t column, const Thing* of, int64_t m) {
      x.resize(m);
      out.resize(m);
      for (int64_t i = 0; i < m; i++) {
        x[i] = of[i].vector;
        out[i] = const_cast<float*>(table_row(of[i].row));
      }
      const float* projection = all->projections[s] + column * W;
      const int64_t stride = all->strides[s], E = p->embedding[s];
      int64_t w = 0;
      for (; w + 2 * L <= W; w += 2 * L) project<2>(x.data(), m, E, projection + w, stride, out.data());
      for (; w < W; w += L) project<1>(x.data(), m, E, projection + w, stride, out.data());
      // out has moved on. An infinite vector makes NaN of the zeros behind a row's numbers.
      for (int64_t i = 0; p->width < W && i < m; i++) std::fill(out[i] - W + p->width, out[i], 0.0f);
    });
  }

  // From the gradient of things' rows to that of their vectors and projections.
  void project_back(const Thing* things, int64_t n) {
    by_part(things, n, [&](int64_t s, int64_t column, const Thing* of, int64_t m) {
      const int64_t E = p->embedding[s], PW = p->columns[s] * W, Ep = (E + L - 1) / L * L;
      std::vector<const float*> g(m);
      x.resize(m);
      for (int64_t i = 0; i < m; i++) {
        x[i] = of[i].vector;
        g[i] = of_table_row(of[i].row);
      }
      float* of_projection = of_projections[s].data() + column * W;
      int64_t w = 0;
      for (; w + 2 * L <= W; w += 2 * L) {
        int64_t e = 0;
        for (; e + 4 <= E; e += 4) outer<4, 2>(x.data(), g.data(), m, e, w, of_projection + w, PW);
        for (; e < E; e++) outer<1, 2>(x.data(), g.data(), m, e, w, of_projection + w, PW);
      }
      for (; w < W; w += L)
        for (int64_t e = 0; e < E; e++) outer<1, 1>(x.data(), g.data(), m, e, w, of_projection + w, PW);
      const float* transposed = &all->transposed[all->transposed_at[of->part]];
      row_of_vector.resize(6 * Ep);
      for (int64_t i = 0; i < m; i += 6) {
        const int64_t some = std::min<int64_t>(6, m - i);
        float* rows[6];
        for (int64_t k = 0; k < some; k++) rows[k] = &row_of_vector[k * Ep];
        int64_t e = 0;
        for (; e + 2 * L <= Ep; e += 2 * L) project<2>(g.data() + i, some, W, transposed + e, Ep, rows);
        for (; e < Ep; e += L) project<1>(g.data() + i, some, W, transposed + e, Ep, rows);
        for (int64_t k = 0; k < some; k++)
          for (int64_t e = 0; e < E; e++) of[i + k].of_vector[e] += row_of_vector[k * Ep + e];
      }
    });
  }

  template <int N, bool KEEP>
  inline vec score_piece(const int32_t* rows, int64_t w, float* keep) const {
    vec h[N], total = {};
    for (int v = 0; v < N; v++) h[v] = load(&state[w + L * v]);
    for (int64_t j = 0; j < 1 + S; j++) {
      const float* row = table_row(rows[j]) + w;
      for (int v = 0; v < N; v++) h[v] += load(row + L * v);
    }
    for (int v = 0; v < N; v++) {
      h[v] = positive(h[v]);
      if (KEEP) store(keep + w + L * v, h[v]);
      total += h[v] * load(&readout[w + L * v]);
    }
    return total;
  }

  // Scores of a row's tuples; or, on the way back, their hidden layer.
  void score(int64_t b, const int32_t* rows) {
    const int64_t n = c->counts[b];
    if (!n) {
      if (!back && c->logits) c->entropy[b] = 0;
      return;
    }
    const int64_t own = state_of(b);
    std::memcpy(state.data(), c->state + own, 4 * p->width);
    std::memcpy(readout.data(), c->readout + own, 4 * p->width);
    if (back && (int64_t)hidden.size() < n * W) hidden.resize(n * W);
    for (int64_t i = 0; i < n; i++, rows += 1 + S) {
      vec total = {};
      int64_t w = 0;
      if (back) {
        for (; w + WIDE * L <= W; w += WIDE * L) score_piece<WIDE, true>(rows, w, &hidden[i * W]);
        for (; w < W; w += L) score_piece<1, true>(rows, w, &hidden[i * W]);
        continue;
      }
      for (; w + WIDE * L <= W; w += WIDE * L) total += score_piece<WIDE, false>(rows, w, nullptr);
      for (; w < W; w += L) total += score_piece<1, false>(rows, w, nullptr);
      c->scores[c->starts[b] + i] = sum(total);
    }
    if (!back && c->logits) c->entropy[b] = normalise(n, c->scores + c->starts[b], c->logits + c->starts[b]);
  }

  template <int N>
  inline void back_piece(int64_t n, const float* of_score, const int32_t* rows, int64_t w) {
    vec state_total[N] = {}, readout_total[N] = {}, read[N];
    for (int v = 0; v < N; v++) read[v] = load(&readout[w + L * v]);
    for (int64_t i = 0; i < n; i++, rows += 1 + S) {
      const float g = of_score[i];
      vec down[N];
      for (int v = 0; v < N; v++) {
        const vec h = load(&hidden[i * W + w + L * v]);
        readout_total[v] += g * h;
        down[v] = h > 0 ? g * read[v] : vec{};
        state_total[v] += down[v];
      }
      for (int64_t j = 0; j < 1 + S; j++) {
        float* row = of_table_row(rows[j]) + w;
        for (int v = 0; v < N; v++) store(row + L * v, load(row + L * v) + down[v]);
      }
    }
    for (int v = 0; v < N; v++) {
      store(&of_state[w + L * v], state_total[v]);
      store(&of_readout[w + L * v], readout_total[v]);
    }
  }

  void score_back(int64_t b, const int32_t* rows) {
    const int64_t n = c->counts[b];
    const int64_t first = c->starts[b];
    if (!n) return;
    const float* down = c->of_scores + first;
    if (c->logits) {
      of_score.resize(n);
      normalise_back(n, c->scores + first, c->logits + first, c->entropy[b], down, c->of_entropy[b], of_score.data());
      down = of_score.data();
    }
    score(b, rows);
    int64_t w = 0;
    for (; w + 2 * L <= W; w += 2 * L) back_piece<2>(n, down, rows, w);
    for (; w < W; w += L) back_piece<1>(n, down, rows, w);
    std::memcpy(c->of_state + state_of(b), of_state.data(), 4 * p->width);
    std::memcpy(c->of_readout + state_of(b), of_readout.data(), 4 * p->width);
  }

  void work(int64_t begin, int64_t end) {
    for (int64_t b = begin, next; b < end; b = next) {
      int64_t T = 0;
      for (next = b; next < end && next - b < ROWS; next++) T += c->counts[next];
      at.resize(T * (1 + S) + 1);
      own.clear();
      new_from = learned.size();
      T = 0;
      for (int64_t r = b; r < next; r++) {
        broken = look_up(r, T);
        if (broken) return;
        T += c->counts[r];
      }
      fixed.resize(fixed_rows * W);
      if ((int64_t)moving.size() < (int64_t)own.size() * W) moving.resize(own.size() * W);
      project_things(learned.data() + new_from, learned.size() - new_from);
      project_things(own.data(), own.size());
      if (back) {
        of_fixed.resize(fixed_rows * W, 0);
        of_moving.assign(own.size() * W, 0);
      }
      T = 0;
      for (int64_t r = b; r < next; r++) {
        if (back) score_back(r, &at[T * (1 + S)]);
        else score(r, &at[T * (1 + S)]);
        T += c->counts[r];
      }
      if (back) project_back(own.data(), own.size());
    }
  }
};

int64_t call(const Plan* p, const Call* c, bool back) {
  Shared all = {p, c, (p->width + L - 1) / L * L, 0, 0, {}, {}, {}, {}, {}, {}, {}};
  for (int64_t s = 0; s < p->sources; s++) {
    const int64_t v = p->vectors[s], w = p->projections[s], begin = p->begin[s] * p->embedding[s];
    const int64_t leading = p->leading[s] * p->width, stride = p->together[s] * p->width;
    float* of_vectors = back ? c->of_floats[v] + begin : nullptr;
    float* of_projections = back ? c->of_floats[w] + leading : nullptr;
    all.pieces.push_back({c->floats[v] + begin, c->floats[w] + leading, of_vectors, of_projections, stride, c->ids[v], c->tables[v]});
  }
  for (int64_t g = 0; g < p->parts; g++) {
    const int64_t s = p->source[g];
    const bool looks_up = all.pieces[s].ids;
    int64_t& total = p->encoded[s] && !looks_up ? all.moving : all.learned;
    all.base.push_back(total);
    total += looks_up ? all.pieces[s].table : p->sizes[s];
  }
  const bool whole = all.W == p->width;
  size_t room = 0;
  for (int64_t s = 0; s < p->sources; s++) room += p->embedding[s] * p->columns[s] * all.W;
  if (!whole) all.padded.assign(room, 0);
  float* padded = all.padded.data();
  for (int64_t s = 0; s < p->sources; s++) {
    const Piece& piece = all.pieces[s];
    all.projections.push_back(whole ? piece.projections : padded);
    all.strides.push_back(whole ? piece.stride : p->columns[s] * all.W);
    if (whole) continue;
    for (int64_t e = 0; e < p->embedding[s]; e++)
      for (int64_t k = 0; k < p->columns[s]; k++, padded += all.W)
        std::memcpy(padded, piece.projections + e * piece.stride + k * p->width, 4 * p->width);
  }
  for (int64_t g = 0; back && g < p->parts; g++) {
    const int64_t s = p->source[g], E = p->embedding[s], Ep = (E + L - 1) / L * L, at = all.transposed.size();
    const float* projection = all.projections[s] + p->column[g] * all.W;
    all.transposed_at.push_back(at);
    all.transposed.resize(at + all.W * Ep, 0);
    for (int64_t i = 0; i < all.W; i++)
      for (int64_t e = 0; e < E; e++) all.transposed[at + i * Ep + e] = projection[e * all.strides[s] + i];
  }
  const int64_t threads = threads_for(c->rows, c->threads, 128);
  std::vector<Worker> workers;
  workers.reserve(threads);
  for (int64_t t = 0; t < threads; t++) workers.emplace_back(&all, back);
  const auto work = [&](int64_t t, int64_t begin, int64_t end) { workers[t].work(begin, end); };
  if (!over_rows(c->rows, threads, work)) return -1;
  for (Worker& worker : workers)
    if (worker.broken) return worker.broken;
  if (!back) return 0;
  // Learned things are shared by all rows, so that their gradients are put together by one thread.
  std::memset(c->of_primaries, 0, 4 * p->primaries * p->width);
  for (Worker& worker : workers) {
    worker.project_back(worker.learned.data(), worker.learned.size());
    for (int64_t i = 0; i < p->primaries; i++)
      for (int64_t w = 0; w < p->width; w++)
        c->of_primaries[i * p->width + w] += worker.of_fixed[(1 + i) * all.W + w];
    for (int64_t s = 0; s < p->sources; s++) {
      const float* from = worker.of_projections[s].data();
      for (int64_t e = 0; e < p->embedding[s]; e++)
        for (int64_t k = 0; k < p->columns[s]; k++, from += all.W) {
          float* to = all.pieces[s].of_projections + e * all.pieces[s].stride + k * p->width;
          for (int64_t w = 0; w < p->width; w++) to[w] += from[w];
        }
    }
  }
  return 0;
}

int64_t guarded(const Plan* p, const Call* c, bool back) {
  try {
    return call(p, c, back);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

}  // namespace

extern "C" {

// 0; or no result: 1 where a tuple is not within the spec, 2 where an id is none of its table, -1 without memory.
int64_t tcg_score(const Plan* p, const Call* c) { return guarded(p, c, false); }
int64_t tcg_score_back(const Plan* p, const Call* c) { return guarded(p, c, true); }
}

// ---- the categorical of all rows

namespace {

double uniform(uint64_t seed, uint64_t row) {  // Philox 4x32-10 (Salmon et al., 2011), 53 bits of it
  uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
  uint32_t c[4] = {(uint32_t)row, (uint32_t)(row >> 32), 0, 0};
  for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    c[0] = (uint32_t)(b >> 32) ^ c[1] ^ key[0];
    c[2] = (uint32_t)(a >> 32) ^ c[3] ^ key[1];
    c[1] = (uint32_t)b;
    c[3] = (uint32_t)a;
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return ((((uint64_t)c[0] << 32) | c[1]) >> 11) * 0x1.0p-53;
}

}  // namespace

extern "C" {

// Scores (N) -> log-probabilities (N) and entropies (B).
void tcg_normalise(int64_t rows, int64_t threads, const int64_t* counts, const int64_t* starts, const float* scores,
                   float* logits, float* entropy) {
  over_rows(rows, threads_for(rows, threads, 256), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) entropy[b] = normalise(counts[b], scores + starts[b], logits + starts[b]);
  });
}

void tcg_normalise_back(int64_t rows, int64_t threads, const int64_t* counts, const int64_t* starts, const float* scores,
                        const float* logits, const float* entropy, const float* of_logits, const float* of_entropy,
                        float* of_scores) {
  over_rows(rows, threads_for(rows, threads, 256), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t at = starts[b];
      normalise_back(counts[b], scores + at, logits + at, entropy[b], of_logits + at, of_entropy[b], of_scores + at);
    }
  });
}

// Draws a tuple of each row into actions (B, H): the no-op in a row without one.
void tcg_draw(int64_t rows, int64_t threads, int64_t values, const int64_t* counts, const int64_t* starts,
              const int64_t* tuples, const int64_t* noop, const float* logits, uint64_t seed, int64_t* actions) {
  over_rows(rows, threads_for(rows, threads, 256), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t* drawn = noop;
      double total = 0, so_far = 0;
      for (int64_t i = starts[b]; i < starts[b] + counts[b]; i++) total += std::exp(logits[i]);
      const double below = uniform(seed, b) * total;
      for (int64_t i = starts[b]; i < starts[b] + counts[b] && (drawn == noop || so_far <= below); i++) {
        const float p = std::exp(logits[i]);
        if (p > 0) drawn = tuples + i * values;
        so_far += p;
      }
      std::memcpy(actions + b * values, drawn, 8 * values);
    }
  });
}

// The log-probability of each action (B, H), and its place among the tuples (N, H): N of one that its row does not list,
// with -inf; N + 1 of the no-op in a row without a tuple, with 0.
void tcg_log_prob(int64_t rows, int64_t values, int64_t total, const int64_t* counts, const int64_t* starts,
                  const int64_t* tuples, const int64_t* noop, const int64_t* actions, const float* logits,
                  int64_t* places, float* log_prob) {
  for (int64_t b = 0; b < rows; b++, actions += values) {
    int64_t at = starts[b];
    const int64_t end = at + counts[b];
    while (at < end && std::memcmp(tuples + at * values, actions, 8 * values)) at++;
    places[b] = at < end ? at : total + (!counts[b] && !std::memcmp(noop, actions, 8 * values));
    log_prob[b] = at < end ? logits[at] : places[b] == total ? -INFINITY : 0;
  }
}

// Whether this machine has the instructions that this object is compiled for.
int64_t tcg_runs_here() {
#if defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}
}
