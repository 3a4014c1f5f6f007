/* faiss_bridge.cpp - the few functions of FAISS's C API that faiss_index.c calls.
 *
 * Debian's libfaiss-dev ships the headers of the C API and the C++ library, but not the objects
 * between the two. This file is those objects: signatures and error codes are those of
 * <faiss/c_api/..._c.h>, which it includes, so the compiler holds it to them; names as faiss_c.h says. Where libfaiss_c
 * exists it is linked instead and this file is not compiled (memory/faiss.cmake).
 *
 * The rule that matters: no C++ exception passes a function of this file. Unlike FAISS's own
 * wrapper it prints nothing. The last error is per thread, as the C API has it.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <faiss/AutoTune.h>
#include <faiss/Index.h>
#include <faiss/impl/FaissException.h>
#include <faiss/index_factory.h>

#include "memory/faiss_c.h"

#include <cstring>
#include <exception>
#include <type_traits>

/* The idx_t of the C API and that of the library are one width: arrays pass without a copy. */
static_assert(sizeof(idx_t) == sizeof(faiss::Index::idx_t) && std::is_signed<faiss::Index::idx_t>::value,
              "faiss_idx_t and faiss::Index::idx_t differ");

namespace {

/* A fixed buffer: keeping the message must not be able to fail. */
thread_local char last_error[1024];

int keep(const char *what, int code) noexcept
{
    size_t n = std::strlen(what);
    if (n > sizeof last_error - 1) n = sizeof last_error - 1;
    std::memcpy(last_error, what, n);
    last_error[n] = '\0';
    return code;
}

template <class Call> int guarded(Call call) noexcept
{
    try {
        call();
        return OK;
    } catch (const faiss::FaissException &e) {
        return keep(e.what(), FAISS_EXCEPT);
    } catch (const std::exception &e) {
        return keep(e.what(), STD_EXCEPT);
    } catch (...) {
        return keep("an exception of unknown type", UNKNOWN_EXCEPT);
    }
}

faiss::Index *object(FaissIndex *index)
{
    return reinterpret_cast<faiss::Index *>(index);
}

const faiss::Index *object(const FaissIndex *index)
{
    return reinterpret_cast<const faiss::Index *>(index);
}

} // namespace

extern "C" {

const char *faiss_get_last_error()
{
    return last_error;
}

int faiss_index_factory(FaissIndex **p_index, int d, const char *description, FaissMetricType metric)
{
    return guarded([&] {
        *p_index = reinterpret_cast<FaissIndex *>(
            faiss::index_factory(d, description, static_cast<faiss::MetricType>(metric)));
    });
}

void faiss_Index_free(FaissIndex *index)
{
    guarded([&] { delete object(index); });
}

int faiss_Index_is_trained(const FaissIndex *index)
{
    return object(index)->is_trained;
}

FaissMetricType faiss_Index_metric_type(const FaissIndex *index)
{
    return static_cast<FaissMetricType>(object(index)->metric_type);
}

int faiss_Index_train(FaissIndex *index, idx_t n, const float *x)
{
    return guarded([&] { object(index)->train(n, x); });
}

int faiss_Index_add(FaissIndex *index, idx_t n, const float *x)
{
    return guarded([&] { object(index)->add(n, x); });
}

int faiss_Index_search(const FaissIndex *index, idx_t n, const float *x, idx_t k, float *distances, idx_t *labels)
{
    return guarded([&] { object(index)->search(n, x, k, distances, labels); });
}

int faiss_Index_reset(FaissIndex *index)
{
    return guarded([&] { object(index)->reset(); });
}

int faiss_Index_sa_code_size(const FaissIndex *index, size_t *size)
{
    return guarded([&] { *size = object(index)->sa_code_size(); });
}

int faiss_ParameterSpace_new(FaissParameterSpace **space)
{
    return guarded([&] { *space = reinterpret_cast<FaissParameterSpace *>(new faiss::ParameterSpace()); });
}

void faiss_ParameterSpace_free(FaissParameterSpace *space)
{
    guarded([&] { delete reinterpret_cast<faiss::ParameterSpace *>(space); });
}

int faiss_ParameterSpace_set_index_parameter(const FaissParameterSpace *space, FaissIndex *index, const char *name,
                                             double value)
{
    return guarded([&] {
        reinterpret_cast<const faiss::ParameterSpace *>(space)->set_index_parameter(object(index), name, value);
    });
}

} // extern "C"
