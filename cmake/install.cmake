# What `cmake --install` puts where: the header, both libraries, the program, the fetch script, a
# pkg-config file and a CMake package. scripts/check_install.sh builds an example against the
# result in both ways.
#
# SPDX-License-Identifier: Apache-2.0
include(CMakePackageConfigHelpers)

install(TARGETS kvfold EXPORT kvfoldTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
# The static library is not exported: it would drag the object library and the warning flags of
# the build along. kvfoldConfig.cmake describes it in three lines instead.
install(TARGETS kvfold_static ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(TARGET kvfold_faiss)
  install(TARGETS kvfold_faiss LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}) # beside the library: it looks there
endif()
install(DIRECTORY include/kvfold DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(PROGRAMS scripts/fetch_model.py DESTINATION ${CMAKE_INSTALL_DATADIR}/kvfold)
install(FILES LICENSE README.md CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
if(TARGET kvfold_program)
  install(TARGETS kvfold_program RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

# Paths relative to the file itself: the tree may be installed to, or moved to, any prefix.
file(RELATIVE_PATH kvf_prefix_from_pc ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(cmake/kvfold.pc.in ${PROJECT_BINARY_DIR}/kvfold.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/kvfold.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

set(kvf_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/kvfold)
configure_package_config_file(cmake/kvfoldConfig.cmake.in ${PROJECT_BINARY_DIR}/kvfoldConfig.cmake
  INSTALL_DESTINATION ${kvf_package_dir}
  PATH_VARS CMAKE_INSTALL_INCLUDEDIR CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kvfoldConfigVersion.cmake
  COMPATIBILITY SameMinorVersion) # before 1.0 a minor version may break callers
install(EXPORT kvfoldTargets NAMESPACE kvfold:: DESTINATION ${kvf_package_dir})
install(FILES ${PROJECT_BINARY_DIR}/kvfoldConfig.cmake ${PROJECT_BINARY_DIR}/kvfoldConfigVersion.cmake
  DESTINATION ${kvf_package_dir})
