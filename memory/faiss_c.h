/* faiss_c.h - FAISS's C API as the two files that speak it see it.
 *
 * With the bridge (faiss_bridge.cpp, no libfaiss_c on the machine) its functions get names of ours: the
 * static library must not define a name that belongs to FAISS, or it clashes with a program that links
 * a libfaiss_c of its own. The declarations are FAISS's in both cases.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MEMORY_FAISS_C_H
#define KVF_MEMORY_FAISS_C_H

#ifdef KVF_FAISS_BRIDGE
#define faiss_get_last_error kvf_faissc_last_error
#define faiss_index_factory kvf_faissc_factory
#define faiss_Index_free kvf_faissc_free
#define faiss_Index_is_trained kvf_faissc_is_trained
#define faiss_Index_metric_type kvf_faissc_metric_type
#define faiss_Index_train kvf_faissc_train
#define faiss_Index_add kvf_faissc_add
#define faiss_Index_search kvf_faissc_search
#define faiss_Index_reset kvf_faissc_reset
#define faiss_Index_sa_code_size kvf_faissc_code_size
#define faiss_ParameterSpace_new kvf_faissc_space_new
#define faiss_ParameterSpace_free kvf_faissc_space_free
#define faiss_ParameterSpace_set_index_parameter kvf_faissc_space_set
#endif

/* Their prototypes are C++'s: f() for f(void). */
#if defined(__GNUC__) && !defined(__cplusplus)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wstrict-prototypes"
#endif
#include <faiss/c_api/AutoTune_c.h>
#include <faiss/c_api/Index_c.h>
#include <faiss/c_api/error_c.h>
#include <faiss/c_api/index_factory_c.h>
#if defined(__GNUC__) && !defined(__cplusplus)
#pragma GCC diagnostic pop
#endif

#endif
