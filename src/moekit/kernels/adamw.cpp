// AdamW (arXiv 1711.05101) over many tensors in one parallel region: the speed of memory is the limit, so each number is
// read and written once, the clipping of the gradient and the rounding of the new weight on the way. Plain loops that the
// compiler turns into vectors; the instruction set is chosen at run time.

#include <vector>

#include "loops.h"

extern "C" {

// One tensor of n numbers. `narrow`: the gradient is bfloat16, else float32.
struct moekit_gradient {
    const void *values;
    int64_t n;
    int32_t narrow;
};

struct moekit_move {
    moekit_gradient gradient;
    float *parameter, *mean, *square;  // the mean of gradients and of their squares
    uint16_t *rounded;                 // where the new parameter goes in bfloat16, or null
    float keep, rate, root;            // 1 - lr decay, lr / (1 - beta1^t), sqrt(1 - beta2^t)
};
}

namespace {

constexpr int64_t PIECE = 1 << 14;  // numbers that a thread takes at a time: 64 KB of each float32 tensor

struct Factors {
    float beta2, mean_share, square_share, epsilon, gradient;
};

struct Piece {
    int64_t tensor, begin, end;
};

template <typename Gradient, bool ROUND>
INLINE void move_numbers(const moekit_move &move, const Factors &by, int64_t begin, int64_t end) {
    const Gradient *__restrict gradient = (const Gradient *)move.gradient.values;
    float *__restrict parameter = move.parameter, *__restrict mean = move.mean, *__restrict square = move.square;
    uint16_t *__restrict rounded = move.rounded;
    const float keep = move.keep, rate = move.rate, root = move.root;
    for (int64_t i = begin; i < end; i++) {
        const float g = widened(gradient[i]) * by.gradient;
        const float m = mean[i] + by.mean_share * (g - mean[i]);
        const float v = by.beta2 * square[i] + by.square_share * g * g;
        const float p = parameter[i] * keep - rate * m / (std::sqrt(v) / root + by.epsilon);
        mean[i] = m, square[i] = v, parameter[i] = p;
        if (ROUND) narrow_to(rounded + i, p);
    }
}

INLINE void move_piece(const moekit_move &move, const Factors &by, int64_t begin, int64_t end) {
    if (move.gradient.narrow) {
        if (move.rounded) move_numbers<uint16_t, true>(move, by, begin, end);
        else move_numbers<uint16_t, false>(move, by, begin, end);
    } else if (move.rounded) move_numbers<float, true>(move, by, begin, end);
    else move_numbers<float, false>(move, by, begin, end);
}

INLINE double squares_in(const moekit_gradient &gradient, int64_t begin, int64_t end) {
    const uint16_t *narrow = (const uint16_t *)gradient.values + begin;
    const float *wide = (const float *)gradient.values + begin;
    if (gradient.narrow) return sum_of(end - begin, [&](int64_t i) { return widened(narrow[i]) * widened(narrow[i]); });
    return sum_of(end - begin, [&](int64_t i) { return wide[i] * wide[i]; });
}

// The same loops, once for each instruction set.
using Move = void (*)(const moekit_move &, const Factors &, int64_t, int64_t);
using Squares = double (*)(const moekit_gradient &, int64_t, int64_t);
void move0(const moekit_move &m, const Factors &by, int64_t begin, int64_t end) { move_piece(m, by, begin, end); }
AT_LEVEL_1 void move1(const moekit_move &m, const Factors &by, int64_t begin, int64_t end) { move_piece(m, by, begin, end); }
AT_LEVEL_2 void move2(const moekit_move &m, const Factors &by, int64_t begin, int64_t end) { move_piece(m, by, begin, end); }
double squares0(const moekit_gradient &g, int64_t begin, int64_t end) { return squares_in(g, begin, end); }
AT_LEVEL_1 double squares1(const moekit_gradient &g, int64_t begin, int64_t end) { return squares_in(g, begin, end); }
AT_LEVEL_2 double squares2(const moekit_gradient &g, int64_t begin, int64_t end) { return squares_in(g, begin, end); }

template <typename Size> std::vector<Piece> pieces_of(int64_t n_tensors, Size size) {
    std::vector<Piece> pieces;
    for (int64_t tensor = 0; tensor < n_tensors; tensor++)
        for (int64_t begin = 0, n = size(tensor); begin < n; begin += PIECE)
            pieces.push_back({tensor, begin, std::min(begin + PIECE, n)});
    return pieces;
}

}  // namespace

extern "C" {

// Move every tensor by one step; gradients are taken `factor` times.
void moekit_adamw(const moekit_move *moves, int64_t n_moves, double beta1, double beta2, double epsilon, double factor,
                  int threads, int level) {
    const Factors by{float(beta2), float(1 - beta1), float(1 - beta2), float(epsilon), float(factor)};
    const std::vector<Piece> pieces = pieces_of(n_moves, [&](int64_t tensor) { return moves[tensor].gradient.n; });
    const Move move = level >= 2 ? move2 : level == 1 ? move1 : move0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < pieces.size(); i++) move(moves[pieces[i].tensor], by, pieces[i].begin, pieces[i].end);
}

// The sum of the squares of all gradients; the order of its terms does not depend on the number of threads.
void moekit_squares(const moekit_gradient *gradients, int64_t n_gradients, double *total, int threads, int level) {
    const std::vector<Piece> pieces = pieces_of(n_gradients, [&](int64_t tensor) { return gradients[tensor].n; });
    const Squares squares = level >= 2 ? squares2 : level == 1 ? squares1 : squares0;
    std::vector<double> found(pieces.size());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < pieces.size(); i++) found[i] = squares(gradients[pieces[i].tensor], pieces[i].begin, pieces[i].end);
    *total = 0;
    for (double one : found) *total += one;
}
}
