# FAISS, the index of another library: KVF_FAISS is AUTO (taken where it is found), ON (an error where
# it is not) or OFF. Sets KVF_FAISS_STATIC_LIBS, what a program that links libkvfold.a needs besides.
#
# It is linked, not loaded on first use: that costs a program 2.7 ms and 6 MB at its start
# (docs/methods/index.md).
#
# SPDX-License-Identifier: Apache-2.0
set(KVF_FAISS AUTO CACHE STRING "Indexes of FAISS: AUTO, ON or OFF")
set_property(CACHE KVF_FAISS PROPERTY STRINGS AUTO ON OFF)

add_library(kvf_faiss INTERFACE)
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

target_sources(kvfold_objects PRIVATE ${CMAKE_CURRENT_LIST_DIR}/faiss_gate.c)
if(kvf_faiss_found)
  set(kvf_faiss_c ${CMAKE_CURRENT_LIST_DIR}/faiss_index.c)
  set(kvf_faiss_bridge ${CMAKE_CURRENT_LIST_DIR}/faiss_bridge.cpp)
  target_sources(kvfold_objects PRIVATE ${kvf_faiss_c})
  target_include_directories(kvfold_objects SYSTEM PRIVATE ${KVF_FAISS_INCLUDE})
  # For omp.h alone; no file of ours holds a parallel region.
  set_source_files_properties(${kvf_faiss_c} TARGET_DIRECTORY kvfold_objects
    PROPERTIES COMPILE_OPTIONS "${OpenMP_C_FLAGS}")
  find_library(KVF_FAISS_C_LIBRARY faiss_c)
  if(KVF_FAISS_C_LIBRARY)
    message(STATUS "FAISS: ${KVF_FAISS_C_LIBRARY}")
    target_link_libraries(kvf_faiss INTERFACE ${KVF_FAISS_C_LIBRARY})
    set(KVF_FAISS_STATIC_LIBS -lfaiss_c)
  else()
    message(STATUS "FAISS: with the bridge to its C API")
    target_sources(kvfold_objects PRIVATE ${kvf_faiss_bridge})
    set_source_files_properties(${kvf_faiss_c} ${kvf_faiss_bridge} TARGET_DIRECTORY kvfold_objects
      PROPERTIES COMPILE_DEFINITIONS KVF_FAISS_BRIDGE)
  endif()
  # A static libfaiss carries no list of what it needs for those who link without CMake.
  list(APPEND KVF_FAISS_STATIC_LIBS -lfaiss -llapack -lblas -lgomp -lstdc++)
  target_link_libraries(kvf_faiss INTERFACE faiss $<LINK_ONLY:OpenMP::OpenMP_CXX>)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    set(kvf_faiss_hide "LINKER:--exclude-libs,libfaiss.a:libfaiss_c.a"
                       "LINKER:--version-script=${CMAKE_CURRENT_LIST_DIR}/faiss.map")
    target_link_options(kvf_faiss INTERFACE
      "$<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,SHARED_LIBRARY>:${kvf_faiss_hide}>")
  endif()
else()
  message(STATUS "FAISS: not built in")
  target_sources(kvfold_objects PRIVATE ${CMAKE_CURRENT_LIST_DIR}/faiss_none.c)
endif()
list(JOIN KVF_FAISS_STATIC_LIBS " " KVF_FAISS_PC_LIBS)
