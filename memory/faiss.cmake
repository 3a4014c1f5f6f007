# FAISS, the index of another library: KVF_FAISS is AUTO (taken where it is found), ON (an error where
# it is not) or OFF. It lives in a module of its own, libkvfold_faiss, which the library loads on first
# use; why: faiss_load.c.
#
# SPDX-License-Identifier: Apache-2.0
set(KVF_FAISS AUTO CACHE STRING "Indexes of FAISS: AUTO, ON or OFF")
set_property(CACHE KVF_FAISS PROPERTY STRINGS AUTO ON OFF)

set(kvf_faiss_found FALSE)
if(NOT KVF_FAISS STREQUAL "OFF")
  find_package(OpenMP QUIET COMPONENTS C CXX)
  if(OpenMP_C_FOUND AND OpenMP_CXX_FOUND)
    find_package(faiss CONFIG QUIET) # its target names OpenMP::OpenMP_CXX
  endif()
  find_path(KVF_FAISS_INCLUDE faiss/c_api/index_factory_c.h)
  if(TARGET faiss AND KVF_FAISS_INCLUDE)
    set(kvf_faiss_found TRUE)
  elseif(NOT KVF_FAISS STREQUAL "AUTO")
    message(FATAL_ERROR "KVF_FAISS=${KVF_FAISS}, but FAISS with the headers of its C API, or OpenMP, is not "
                        "here: install libfaiss-dev (and libomp-dev for clang), or set KVF_FAISS=OFF")
  endif()
endif()

set(kvf_memory ${CMAKE_CURRENT_LIST_DIR})
if(NOT kvf_faiss_found)
  message(STATUS "FAISS: not built in")
  target_sources(kvfold_objects PRIVATE ${kvf_memory}/faiss_none.c)
  return()
endif()

# FAISS's C API: libfaiss_c, or the bridge where there are only its headers.
add_library(kvf_faiss_c INTERFACE)
target_include_directories(kvf_faiss_c SYSTEM INTERFACE ${KVF_FAISS_INCLUDE})
target_link_libraries(kvf_faiss_c INTERFACE faiss OpenMP::OpenMP_C OpenMP::OpenMP_CXX)
find_library(KVF_FAISS_C_LIBRARY faiss_c)
if(KVF_FAISS_C_LIBRARY)
  message(STATUS "FAISS: ${KVF_FAISS_C_LIBRARY}")
  target_link_libraries(kvf_faiss_c INTERFACE ${KVF_FAISS_C_LIBRARY})
else()
  message(STATUS "FAISS: with the bridge to its C API")
  target_sources(kvf_faiss_c INTERFACE ${kvf_memory}/faiss_bridge.cpp)
  target_compile_definitions(kvf_faiss_c INTERFACE KVF_FAISS_BRIDGE)
endif()

target_sources(kvfold_objects PRIVATE ${kvf_memory}/faiss_load.c)

# It shares no object with the library, but what it needs of base/ compiled a second time: an archive
# linked into a program exports nothing that a module could use.
add_library(kvfold_faiss MODULE ${kvf_memory}/faiss_index.c ${kvf_memory}/faiss_exact.c
  ${PROJECT_SOURCE_DIR}/src/base/error.c ${PROJECT_SOURCE_DIR}/src/base/mem.c)
target_include_directories(kvfold_faiss PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include)
target_link_libraries(kvfold_faiss PRIVATE kvf_flags kvf_faiss_c)
set_target_properties(kvfold_faiss PROPERTIES PREFIX lib SUFFIX .so LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  target_link_options(kvfold_faiss PRIVATE LINKER:--version-script=${kvf_memory}/faiss.map)
endif()
