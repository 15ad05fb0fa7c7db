// Random layers in device buffers of exactly their size, and their outputs in float64 with the rounding bound of
// tests/kernel_fixtures.py: for the programs that run where PyTorch does not.
#pragma once

#include "../pifaLinear/pifaLinearPlan.h"

#include <cmath>
#include <cstdio>
#include <cuda_runtime_api.h>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

namespace pifaTest
{

inline std::mt19937& generator()
{
    static std::mt19937 only(0);
    return only;
}

inline bool succeeded(cudaError_t error, char const* what)
{
    if (error != cudaSuccess)
    {
        std::printf("%s: %s\n", what, cudaGetErrorString(error));
    }
    return error == cudaSuccess;
}

// Device memory of exactly `bytes`; null for none, as the interface has it.
class Buffer
{
public:
    explicit Buffer(size_t bytes)
    {
        good = bytes == 0 || succeeded(cudaMalloc(&data, bytes), "cudaMalloc");
    }
    // Holds a copy of `values`.
    template <typename T>
    explicit Buffer(std::vector<T> const& values)
        : Buffer(values.size() * sizeof(T))
    {
        size_t const bytes = values.size() * sizeof(T);
        good = good
            && (bytes == 0 || succeeded(cudaMemcpy(data, values.data(), bytes, cudaMemcpyHostToDevice), "copy"));
    }
    Buffer(Buffer const&) = delete;
    Buffer& operator=(Buffer const&) = delete;
    ~Buffer()
    {
        cudaFree(data);
    }
    template <typename T>
    bool read(std::vector<T>& values) const
    {
        return succeeded(cudaMemcpy(values.data(), data, values.size() * sizeof(T), cudaMemcpyDeviceToHost), "copy back");
    }
    void* data = nullptr;
    bool good = false;
};

template <typename T>
std::vector<T> randomValues(int64_t count, float scale)
{
    std::normal_distribution<float> normal(0.0F, scale);
    std::vector<T> values(static_cast<size_t>(count));
    for (T& value : values)
    {
        value = pifa::fromFloat<T>(normal(generator()));
    }
    return values;
}

template <typename T>
struct Factors
{
    PifaProblem p;
    std::vector<T> x, weight, coefficients, bias;
    std::vector<int32_t> index;

    explicit Factors(PifaProblem const& problem)
        : p(problem)
    {
        bool const row = p.form == PIFA_FORM_ROW;
        x = randomValues<T>(p.tokens * p.inFeatures, 1.0F);
        weight = randomValues<T>(p.rank * (row ? p.inFeatures : p.outFeatures), 0.5F);
        coefficients = randomValues<T>(p.rank * ((row ? p.outFeatures : p.inFeatures) - p.rank), 0.5F);
        bias = randomValues<T>(p.hasBias ? p.outFeatures : 0, 1.0F);
        index.resize(p.hasIndex ? (row ? p.outFeatures : p.inFeatures) : 0);
        std::iota(index.begin(), index.end(), 0);
        std::shuffle(index.begin(), index.end(), generator());
    }

    double at(std::vector<T> const& values, int64_t i) const
    {
        return pifa::toFloat(values[static_cast<size_t>(i)]);
    }

    // Half the distance between subnormals: what rounding costs where values are tiny.
    static double tiny()
    {
        return std::ldexp(1.0, sizeof(T) == 4 ? -150 : std::is_same<T, __half>::value ? -25 : -134);
    }

    // The intermediate of one token in float64, and how far off it may be.
    void middle(int64_t token, double unit, std::vector<double>& z, std::vector<double>& off) const
    {
        bool const row = p.form == PIFA_FORM_ROW;
        int64_t const depth = row ? p.inFeatures : p.inFeatures - p.rank;
        double const gamma = static_cast<double>(p.inFeatures + p.rank) * std::ldexp(1.0, -24);
        auto const input = [&](int64_t i) { return at(x, token * p.inFeatures + (row || index.empty() ? i : index[i])); };
        for (int64_t i = 0; i < p.rank; ++i)
        {
            double sum = row ? 0.0 : input(i);
            double size = std::abs(sum);
            for (int64_t k = 0; k < depth; ++k)
            {
                double const term = at(row ? weight : coefficients, i * depth + k) * input(row ? k : p.rank + k);
                sum += term;
                size += std::abs(term);
            }
            z[i] = sum;
            off[i] = unit * std::abs(sum) + gamma * size + tiny();
        }
    }

    // The largest error of `y` in units of its bound; infinite where y has a NaN.
    double worst(std::vector<T> const& y) const
    {
        bool const row = p.form == PIFA_FORM_ROW;
        double const unit = sizeof(T) == 4 ? std::ldexp(1.0, -24)
            : std::is_same<T, __half>::value ? std::ldexp(1.0, -11)
                                             : std::ldexp(1.0, -8);
        std::vector<double> z(p.rank), off(p.rank);
        double most = 0.0;
        for (int64_t t = 0; t < p.tokens; ++t)
        {
            middle(t, unit, z, off);
            for (int64_t j = 0; j < p.outFeatures; ++j)
            {
                int64_t const s = row && !index.empty() ? index[j] : j;
                bool const copied = row && s < p.rank;
                double value = copied ? z[s] : 0.0;
                double bound = copied ? off[s] : 0.0;
                for (int64_t k = 0; k < p.rank && !copied; ++k)
                {
                    double const w = row ? at(coefficients, (s - p.rank) * p.rank + k) : at(weight, j * p.rank + k);
                    value += w * z[k];
                    bound += std::abs(w) * off[k];
                }
                double const b = p.hasBias ? at(bias, j) : 0.0;
                bound += unit * (std::abs(value + b) + std::abs(b)) + tiny();
                double const error = std::abs(at(y, t * p.outFeatures + j) - (value + b)) / bound;
                most = std::isnan(error) ? INFINITY : std::max(most, error);
            }
        }
        return most;
    }
};

} // namespace pifaTest
