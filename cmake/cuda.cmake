# CUDA: KVF_CUDA is AUTO (the module libkvfold_cuda where there is nvcc), ON (an error where there is none)
# or OFF. The library never links it: src/backend/backend_load.c opens it where a driver is. The kernels are
# also compiled for the CPU, for the tests (cuda/emu), which needs no part of CUDA.
#
# KVF_CUDA_ARCHITECTURES is `dev` (sm_80, which catches slips that only Hopper forgives, and sm_90a),
# `release` (all from Ampere on, and PTX for what comes after), or a list as CMAKE_CUDA_ARCHITECTURES takes it.
#
# SPDX-License-Identifier: Apache-2.0
set(KVF_CUDA AUTO CACHE STRING "CUDA backend: AUTO, ON or OFF")
set_property(CACHE KVF_CUDA PROPERTY STRINGS AUTO ON OFF)
set(KVF_CUDA_ARCHITECTURES dev CACHE STRING "dev, release, or a list of architectures")

target_sources(kvfold_objects PRIVATE src/backend/backend_load.c)

set(kvf_cuda_sources cuda_attn cuda_backend cuda_device cuda_far cuda_lt cuda_matmul cuda_memory
  k_attn_decode k_attn_mass k_attn_prefill k_digest k_gemm k_gemv k_rope k_select k_vec k_video k_vote k_weights)
list(TRANSFORM kvf_cuda_sources PREPEND ${PROJECT_SOURCE_DIR}/cuda/)
list(TRANSFORM kvf_cuda_sources APPEND .cu)

# Fibers are switched behind the thread sanitizer's back.
if(KVF_TESTS AND NOT KVF_SANITIZE MATCHES "thread" AND NOT KVF_FUZZ)
  add_subdirectory(cuda/emu)
endif()

set(kvf_cuda_found FALSE)
if(NOT KVF_CUDA STREQUAL "OFF" AND NOT KVF_SANITIZE AND NOT KVF_FUZZ)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(kvf_cuda_found TRUE)
  elseif(NOT KVF_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "KVF_CUDA=${KVF_CUDA}, but there is no nvcc: put it on the PATH, or set KVF_CUDA=OFF")
  endif()
endif()
if(NOT kvf_cuda_found)
  message(STATUS "CUDA: not built in")
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES) # before the language is enabled, which sets it
  if(KVF_CUDA_ARCHITECTURES STREQUAL "dev")
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real)
  elseif(KVF_CUDA_ARCHITECTURES STREQUAL "release")
    set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real 100-real 120-real 120-virtual)
  else()
    set(CMAKE_CUDA_ARCHITECTURES ${KVF_CUDA_ARCHITECTURES})
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit 12 REQUIRED)
message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

# What it needs of base/ is compiled a second time, as for the module of FAISS.
add_library(kvf_cuda_objects OBJECT ${kvf_cuda_sources} cuda/arena.cpp
  src/base/dtype.c src/base/error.c src/base/mem.c src/base/turn.c)
target_include_directories(kvf_cuda_objects PUBLIC ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include)
# A kernel that spills registers is a mistake: it fails the build. Debug builds (-G) spill all of them.
target_compile_options(kvf_cuda_objects PUBLIC $<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra
  $<$<NOT:$<CONFIG:Debug>>:-Xptxas=-warn-spills,-Werror> $<$<BOOL:${KVF_WERROR}>:-Werror=all-warnings -Xcompiler=-Werror>>)
set(kvf_cuda_properties CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static)
set_target_properties(kvf_cuda_objects PROPERTIES ${kvf_cuda_properties})

add_library(kvfold_cuda MODULE $<TARGET_OBJECTS:kvf_cuda_objects>)
target_link_libraries(kvfold_cuda PRIVATE CUDA::cudart_static Threads::Threads ${CMAKE_DL_LIBS})
set_target_properties(kvfold_cuda PROPERTIES PREFIX lib SUFFIX .so LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}
  LINKER_LANGUAGE CXX)
target_link_options(kvfold_cuda PRIVATE LINKER:--version-script=${PROJECT_SOURCE_DIR}/cuda/cuda.map)
install(TARGETS kvfold_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}) # beside the library: it looks there

# Kernel benchmarks (scripts/gpu_check.sh); they say so and end where there is no device.
if(KVF_BENCH)
  add_executable(bench_cuda bench/bench_cuda.cu)
  target_link_libraries(bench_cuda PRIVATE kvf_cuda_objects CUDA::cudart_static Threads::Threads ${CMAKE_DL_LIBS})
  set_target_properties(bench_cuda PROPERTIES ${kvf_cuda_properties})
endif()
